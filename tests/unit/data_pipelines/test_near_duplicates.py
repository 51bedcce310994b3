"""Copies that were resized or compressed are found, whatever else is there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.check import check_shard_set
from data_pipelines.near_duplicates import MAX_DISTANCE, perceptual_hash, twins_across_groups
from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from tests.unit.data_pipelines.small_shards import write_picture


@st.composite
def hashes_and_groups(draw) -> tuple[np.ndarray, np.ndarray]:
    """A few hashes, and others that differ from them in a few bits."""
    bases = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=6)
    hashes = draw(st.lists(st.tuples(st.sampled_from(bases), flips), max_size=12))
    groups = draw(st.lists(st.integers(0, 2), min_size=len(hashes), max_size=len(hashes)))
    values = [base ^ sum(1 << bit for bit in set(bits)) for base, bits in hashes]
    return np.array(values, np.uint64), np.array(groups, np.int64)


@given(hashes_and_groups())
def test_twins_are_those_of_a_comparison_of_all_with_all(arguments):
    hashes, groups = arguments

    def are_twins(one: int, other: int) -> bool:
        return groups[one] != groups[other] and (int(hashes[one]) ^ int(hashes[other])).bit_count() <= MAX_DISTANCE

    for index, twin in enumerate(twins_across_groups(hashes, groups).tolist()):
        expected = [other for other in range(len(hashes)) if are_twins(index, other)]
        assert (twin in expected) if expected else twin == -1


def photo(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((400, 320), 3)
    return Image.fromarray((np.asarray(coarse) + random.normal(0, 5, (320, 400, 1))).clip(0, 255).astype(np.uint8))


def test_few_bits_change_with_size_and_compression_and_many_with_the_picture(tmp_path):
    distances_of_copies, distances_of_others = [], []
    for seed in range(20):
        image, other = photo(seed), photo(seed + 100)
        image.resize((250, 200)).save(tmp_path / "copy.jpg", quality=40)
        with Image.open(tmp_path / "copy.jpg") as copy:
            distances_of_copies.append((perceptual_hash(image) ^ perceptual_hash(copy)).bit_count())
        distances_of_others.append((perceptual_hash(image) ^ perceptual_hash(other)).bit_count())
    assert max(distances_of_copies) <= MAX_DISTANCE
    assert min(distances_of_others) > 2 * MAX_DISTANCE


@pytest.mark.parametrize("full", [True, False])
def test_check_finds_near_duplicates_across_splits_only(tmp_path, full):
    for index in range(6):
        write_picture(tmp_path / "pictures" / "train" / "one" / f"{index}.jpg", index, size=(80, 60))
        write_picture(tmp_path / "pictures" / "test" / "two" / f"{index}.jpg", 50 + index, size=(80, 60))
    image = photo(0)
    for split, name, size in (("train", "one", 400), ("train", "one", 399), ("test", "two", 200)):
        folder = tmp_path / "pictures" / split / name
        image.resize((size, size * 4 // 5)).save(folder / f"photo{size}.jpg", quality=60)
    source = ClassFolders(ClassFoldersSettings(folder=tmp_path / "pictures"))
    with write_shards(source, tmp_path / "shards", ShardSettings()) as shard_set:
        [finding] = check_shard_set(shard_set, full=full).findings
    assert (finding.severity, finding.kind) == ("warning", "near_duplicates_across_splits")
    assert "3 of 15 pictures" in finding.message
    assert "test/two/photo200" in finding.message
