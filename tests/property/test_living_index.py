"""Whatever is added, replaced, deleted, compacted, rolled back and reopened: a live index equals a dictionary."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy import ndarray

from indexing.building.build import build_index
from indexing.living.live_index import LiveIndex
from indexing.settings import IndexSettings
from indexing.sources.arrays import ArraySource
from indexing.versions import current_version, versions_of
from lookalike.errors import DataError
from lookalike.filters import Between
from lookalike.id_selection import IdSelection
from lookalike.records import SearchParameters

DIM, NUM_DIRECTIONS = 8, 12
ids_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True)
# Few directions: equal vectors under several ids, so that ties are common.
directions = st.integers(0, NUM_DIRECTIONS - 1)


def direction(number: int) -> ndarray:
    vector = np.random.default_rng(number).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class LivingIndex(RuleBasedStateMachine):
    @initialize()
    def build(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        np.save(self.place / "vectors.npy", np.stack([direction(n) for n in (0, 1, 2, 0, 3, 4)]))
        np.save(self.place / "ids.npy", np.array([3, 1, 4, 15, 9, 26]))
        self.folder = self.place / "index"
        arrays = ArraySource(self.place / "vectors.npy", self.place / "ids.npy")
        build_index(arrays, self.folder, IndexSettings(type="Flat"))
        self.live = LiveIndex.open(self.folder)
        self.other = LiveIndex.open(self.folder)
        self.oracle = {3: (0, "3"), 1: (1, "1"), 4: (2, "4"), 15: (0, "15"), 9: (3, "9"), 26: (4, "26")}
        self.highest = 26

    def teardown(self) -> None:
        if hasattr(self, "live"):
            self.live.close()
            self.other.close()
            shutil.rmtree(self.place)

    @rule(numbers=st.lists(directions, min_size=1, max_size=3), key=st.text("abc", max_size=2))
    def add(self, numbers: list[int], key: str) -> None:
        added = self.live.add(np.stack([direction(n) for n in numbers]), [{"key": key}] * len(numbers))
        assert added.tolist() == list(range(self.highest + 1, self.highest + 1 + len(numbers)))
        self.highest += len(numbers)
        self.oracle.update({int(i): (n, key) for i, n in zip(added, numbers, strict=True)})

    @rule(ids=ids_strategy, number=directions)
    def add_under(self, ids: list[int], number: int) -> None:
        vectors = np.stack([direction(number)] * len(ids))
        if any(i in self.oracle for i in ids):
            with pytest.raises(ValueError, match="in use"):
                self.other.add(vectors, ids=ids)
            return
        self.other.add(vectors, ids=ids)
        self.highest = max(self.highest, *ids)
        self.oracle.update({i: (number, str(i)) for i in ids})

    @rule(ids=ids_strategy, number=directions, key=st.text("abc", max_size=2))
    def replace(self, ids: list[int], number: int, key: str) -> None:
        vectors = np.stack([direction(number)] * len(ids))
        if any(i not in self.oracle for i in ids):
            with pytest.raises(KeyError):
                self.live.replace(ids, vectors)
            return
        self.live.replace(ids, vectors, [{"key": key}] * len(ids))
        self.oracle.update(dict.fromkeys(ids, (number, key)))

    @rule(ids=ids_strategy)
    def delete(self, ids: list[int]) -> None:
        here = [i for i in ids if i in self.oracle]
        if len(here) < len(ids):
            with pytest.raises(KeyError):
                self.other.delete(ids)
        self.other.delete(here)
        for i in here:
            del self.oracle[i]

    @rule(keep=st.integers(1, 3))
    def compact(self, keep: int) -> None:
        if self.oracle:
            self.live.compact(keep_versions=keep)
            assert self.live.num_changes == 0
        elif self.live.num_changes:
            with pytest.raises(DataError):
                self.live.compact()

    @rule(place=st.integers(0, 5))
    def publish(self, place: int) -> None:
        versions = versions_of(self.folder)
        self.other.publish(versions[place % len(versions)])

    @rule()
    def reopen(self) -> None:
        self.live.close()
        self.live = LiveIndex.open(self.folder)
        assert self.live.view().base.version == current_version(self.folder)

    @rule(
        number=directions,
        k=st.integers(1, 12),
        chosen=ids_strategy,
        excludes=st.booleans(),
        key=st.text("abc", max_size=1),
    )
    def search(self, number: int, k: int, chosen: list[int], excludes: bool, key: str) -> None:
        query = direction(number)
        among = IdSelection.all_but(chosen) if excludes else IdSelection.only(chosen)
        fitting = [i for i, (_, own) in self.oracle.items() if own >= key and (i in chosen) != excludes]
        expected = self.ranking(query, fitting)[:k]
        for index in (self.live, self.other):
            parameters = SearchParameters(k=k, among=among, filter=Between("key", at_least=key))
            assert index.search(query[None], parameters).ids[0].tolist() == expected + [-1] * (k - len(expected))

    @invariant()
    def equals_the_oracle(self) -> None:
        if not hasattr(self, "oracle"):
            return
        ids = np.array(sorted(self.oracle), np.int64)
        query = direction(5)
        for index in (self.live, self.other):
            assert index.num_vectors == len(ids)
            np.testing.assert_array_equal(index.ids(), ids)
            assert [row["key"] for row in index.metadata_of(ids)] == [self.oracle[int(i)][1] for i in ids]
            for i, vector in zip(ids, index.vectors_of(ids), strict=True):
                np.testing.assert_array_equal(vector, direction(self.oracle[int(i)][0]))
            hits = index.search(query[None], SearchParameters(k=len(ids) + 2))
            assert hits.ids[0].tolist() == [*self.ranking(query, list(self.oracle)), -1, -1]

    def ranking(self, query: ndarray, ids: list[int]) -> list[int]:
        # One score per direction: equal vectors tie exactly.
        scores = {n: float(direction(n).astype(np.float64) @ query) for n in range(NUM_DIRECTIONS)}
        return sorted(ids, key=lambda i: (-scores[self.oracle[i][0]], i))


TestLivingIndex = LivingIndex.TestCase
TestLivingIndex.settings = settings(
    max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
