from pathlib import Path

import numpy as np
import pytest

from indexing.index_types import IndexType, create_untrained
from indexing.vector_store import VectorStore
from lookalike.errors import SettingsError


@pytest.mark.parametrize(
    "name", ["Flat", "IVF2,Flat", "IVF4096,SQfp16", "IVF16,SQ8", "IVF16,RaBitQ", "HNSW32", "HNSW8,SQ8"]
)
def test_names_are_read_and_written(name: str) -> None:
    assert IndexType.parse(name).name == name


@pytest.mark.parametrize(
    "name", ["", "flat", "IVF1,Flat", "IVF0,SQ8", "IVF16", "IVF16,PQ8", "HNSW", "HNSW1", "HNSW8,RaBitQ"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="is not one of"):
        IndexType.parse(name)


@pytest.mark.parametrize("name", ["IVF4,Flat", "IVF4,SQfp16", "IVF4,SQ8", "IVF4,RaBitQ"])
@pytest.mark.parametrize("dim", [16, 36, 512])
def test_the_size_of_codes_is_that_of_faiss(name: str, dim: int) -> None:
    index_type = IndexType.parse(name)
    assert create_untrained(index_type, dim, seed=0).code_size == index_type.code_bytes(dim)


def test_a_store_finds_rows_by_id_whatever_the_order_they_came_in(tmp_path: Path) -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(4, 3)
    store = VectorStore.of(vectors, np.array([2**50, 7, 30, 1]))
    assert store.ids.tolist() == [1, 7, 30, 2**50]
    np.testing.assert_array_equal(store.vectors_of(np.array([2**50, 1])), vectors[[0, 3]])
    for absent in (0, 8, 2**50 + 1):
        with pytest.raises(KeyError, match=str(absent)):
            store.rows_of(np.array([7, absent]))
    empty = VectorStore.of(vectors[:0], np.zeros(0, np.int64))
    with pytest.raises(KeyError):
        empty.rows_of(np.array([1]))
    assert empty.vectors_of(np.zeros(0, np.int64)).shape == (0, 3)
