"""Other versions: checked before they serve, refused where they do not fit, changed over to without a failed search."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from indexing import versions
from indexing.building.build import build_index
from indexing.embedding_set import EmbeddingSet
from indexing.published_index import PublishedIndex, read_index_manifest
from indexing.settings import IndexSettings
from indexing.sources.embeddings import EmbeddingSource
from lookalike.artifacts import write_manifest
from lookalike.encoder import load_encoder, save_encoder
from lookalike.errors import ManifestMismatch
from lookalike.records import SearchParameters
from serving.engine.errors import UnknownVersionError, VersionRefusedError
from serving.engine.queries import QueryPart, SearchQuery
from serving.engine.query_engine import QueryEngine
from serving.observability.metrics import ServingMetrics
from tests.unit.serving.engine.colour_index import COLOURS, build_colours, engine_of
from tests.unit.serving.engine.fake_encoder import FakeEncoder, unit
from tests.unit.serving.small_index import SmallIndex


@pytest.fixture
def two_versions(small_index: SmallIndex, tmp_path: Path) -> Path:
    """v0001 and v0002 of one embedding set."""
    index = tmp_path / "index"
    shutil.copytree(small_index.index, index)
    embeddings = EmbeddingSet.open(small_index.index.parent / "embeddings")
    build_index(EmbeddingSource(embeddings), index, IndexSettings(type="IVF2,Flat"))
    versions.publish(index, "v0001")
    return index


@pytest.fixture
def engine(two_versions: Path, small_index: SmallIndex) -> Iterator[QueryEngine]:
    engine = QueryEngine.open(two_versions, shards_folder=small_index.shards, metrics=ServingMetrics())
    yield engine
    engine.close()


def spoil_vectors(version: Path) -> None:
    """As if the encoder's code or weights had changed since: every file is whole, but the vectors are others'."""
    vectors = np.load(version / "vectors.npy")
    np.save(version / "vectors.npy", np.roll(vectors, 1, axis=0))


def spoil_encoder(version: Path) -> None:
    encoder = load_encoder(version / "encoder")
    with torch.no_grad():
        next(encoder.parameters()).mul_(-1)
    save_encoder(encoder, version / "encoder", replace=True)


def spoil_transform(version: Path) -> None:
    manifest = read_index_manifest(version)
    details = {**manifest.details, "transform_fingerprint": "0" * 64}
    write_manifest(version, replace(manifest, details=details))


def outcomes_of(engine: QueryEngine) -> dict[str, float]:
    assert engine._metrics is not None
    return {
        sample.labels["outcome"]: sample.value
        for metric in engine._metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "lookalike_index_swaps_total"
    }


def test_a_version_that_fits_is_swapped_to_and_back(engine: QueryEngine) -> None:
    assert asyncio.run(engine.swap("v0002")) == "v0002"
    assert engine.served().index_version == "v0002"
    found = asyncio.run(engine.search(SearchQuery((QueryPart(id=2),))))
    assert found.index_version == "v0002"
    listed = asyncio.run(engine.versions()).versions
    assert [(one.name, one.is_current, one.is_served) for one in listed] == [
        ("v0001", False, False),
        ("v0002", True, True),
    ]
    assert asyncio.run(engine.rollback()) == "v0001"
    assert engine.served().index_version == "v0001"
    assert outcomes_of(engine) == {"done": 2.0}
    for wrong in (engine.swap("v0009"), engine.rollback()):
        with pytest.raises(UnknownVersionError):
            asyncio.run(wrong)


def test_versions_of_one_collection_share_one_encoder_and_one_shard_set(engine: QueryEngine) -> None:
    before = engine.served()
    asyncio.run(engine.swap("v0002"))
    after = engine.served()
    assert after.encoder is before.encoder
    assert after.shards is before.shards


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (spoil_vectors, ["v0002", "canary", "cosine"]),
        (spoil_encoder, ["v0002", "built with encoder", "but here it is"]),
        (spoil_transform, ["v0002", "built with evaluation transform 000000000000", "but here it is"]),
    ],
)
def test_a_version_that_does_not_fit_is_refused_and_the_one_before_goes_on(
    engine: QueryEngine, two_versions: Path, spoil: Callable[[Path], None], names: list[str]
) -> None:
    spoil(two_versions / "v0002")
    with pytest.raises(VersionRefusedError) as refusal:
        asyncio.run(engine.swap("v0002"))
    assert isinstance(refusal.value.__cause__, ManifestMismatch)
    for name in names:
        assert name in str(refusal.value)
    assert versions.current_version(two_versions) == "v0001"
    assert asyncio.run(engine.search(SearchQuery((QueryPart(id=2),)))).index_version == "v0001"
    assert outcomes_of(engine) == {"refused": 1.0}


def test_a_version_that_another_program_publishes_is_refused_too(
    engine: QueryEngine, two_versions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil_vectors(two_versions / "v0002")
    versions.publish(two_versions, "v0002")

    async def search_until_told() -> None:
        while "v0002" not in caplog.text:
            answer = await engine.search(SearchQuery((QueryPart(id=2),)))
            assert answer.index_version == "v0001"
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(search_until_told(), timeout=30))
    assert "stays at version v0001" in caplog.text
    assert [one.is_served for one in asyncio.run(engine.versions()).versions if one.is_current] == [False]


def test_a_server_does_not_start_on_a_version_whose_canaries_fail(two_versions: Path, small_index: SmallIndex) -> None:
    spoil_vectors(two_versions / "v0001")
    with pytest.raises(ManifestMismatch, match=r"v0001.*gives other ones"):
        QueryEngine.open(two_versions, shards_folder=small_index.shards)


def test_after_replacements_most_canaries_must_fit(
    engine: QueryEngine, two_versions: Path, small_index: SmallIndex
) -> None:
    canaries = engine.index.manifest.details["canary_ids"]
    ring = (small_index.pictures / "ring" / "gold.jpg").read_bytes()
    vector = np.random.default_rng(0).normal(size=engine.index.dim)
    asyncio.run(engine.replace(canaries[0], picture=ring))
    asyncio.run(engine.replace(canaries[1], vector=vector))
    # The first is judged by its new picture; nothing is known of the second but a picture that it no longer shows.
    assert asyncio.run(engine.compact()) == "v0003"
    assert engine.served().index_version == "v0003"
    spoil_vectors(two_versions / "v0003")
    with pytest.raises(ManifestMismatch, match="v0003"):
        QueryEngine.open(two_versions, shards_folder=small_index.shards)


def test_searches_never_fail_during_swaps_changes_and_compaction(tmp_path: Path) -> None:
    index = build_colours(tmp_path, index_type="IVF2,Flat")
    build_colours(tmp_path, index_type="Flat")
    engine = engine_of(index, FakeEncoder())
    olive = unit((120, 120, 10))

    async def run() -> list[Any]:
        is_over = asyncio.Event()

        async def search() -> int:
            num_searches = 0
            while not is_over.is_set():
                query = SearchQuery((QueryPart(vector=unit(COLOURS[num_searches % 26])),), SearchParameters(k=5))
                answer = await engine.search(query)
                assert len(answer.hits) == 5
                # The colour itself, or what was just added beside it: never one that is not there.
                assert answer.hits[0].score > 0.99
                num_searches += 1
            return num_searches

        async def change() -> None:
            for _ in range(5):
                added = await engine.add(vector=olive)
                await engine.rollback()
                await engine.delete(added.id)
                await engine.swap("v0002")
            await engine.add(vector=olive, id=777)
            assert await engine.compact() == "v0003"
            is_over.set()

        return await asyncio.gather(*[search() for _ in range(4)], change())

    *counts, _ = asyncio.run(run())
    assert min(counts) > 10
    assert PublishedIndex.open(index).version == "v0003"
    assert engine.served().view.delta.num_vectors == 0
    assert asyncio.run(engine.item(777)).id == 777
    engine.close()
