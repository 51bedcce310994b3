import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.shard_set import ShardSet
from evaluation.record import (
    NONE,
    UNKNOWN,
    PictureCounts,
    ProtocolRecord,
    input_size_rule,
    record_of_embeddings,
    record_of_files,
)
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.published_index import PublishedIndex
from indexing.settings import EmbedSettings
from indexing.sources.embeddings import EmbeddingSource
from lookalike.artifacts import Manifest, versions
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings, WhiteningSettings
from lookalike.errors import ManifestMismatch
from lookalike.filters import OneOf
from lookalike.id_selection import IdSelection
from lookalike.records import Effort, SearchParameters
from lookalike.settings import dump_settings

SETTINGS = EncoderSettings(
    backbone="resnet10t", input=InputSettings(max_side=32, scales=(1.0, 0.5), interpolation="bilinear")
)


@pytest.fixture(scope="module")
def made(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EmbeddingSet, PublishedIndex]:
    folder = tmp_path_factory.mktemp("record")
    torch.manual_seed(0)
    with ShardSet.open(shards_folder) as shard_set:
        settings = EmbedSettings(storage="float16")
        embeddings = embed_shards(create_encoder(SETTINGS), shard_set, folder / "set", split="test", settings=settings)
    return embeddings, build_index(EmbeddingSource(embeddings), folder / "index")


def of_embeddings(manifest: Manifest, **changes: Any) -> ProtocolRecord:
    options: dict[str, Any] = {"ground_truth": "abc", "ties": "by id", "crop": "whole pictures"} | changes
    return record_of_embeddings("shapes", "each searches all others", {"gallery": manifest}, SETTINGS, **options)


def file(name: str, num_rows: int, *, dtype: str = "float32") -> dict[str, Any]:
    return {"file": f"{name}.npy", "dtype": dtype, "shape": [num_rows, 8], "sha256": "abc"}


def test_bare_descriptors_say_what_they_are_and_admit_what_is_unknown() -> None:
    record = record_of_files(
        "roxford5k",
        "official",
        {
            "queries": [file("q", 2)],
            "gallery": [file("d", 5)],
            "distractors": [file("m", 4, dtype="float16"), file("n", 3)],
        },
        ground_truth="abc",
        ties="index",
        expected={"queries": 2, "gallery": 6},
    )
    tree = record.as_json()
    assert tree["counts"] == {
        "queries": {"expected": 2, "found": 2, "failed": UNKNOWN},
        "gallery": {"expected": 6, "found": 5, "failed": UNKNOWN},
        "distractors": {"expected": UNKNOWN, "found": 7, "failed": UNKNOWN},
    }
    assert tree["vector_dtypes"] == {"queries": "float32", "gallery": "float32", "distractors": "mixed"}
    assert tree["num_distractors"] == 7
    assert tree["files"] == [
        {"role": "queries", **file("q", 2)},
        {"role": "gallery", **file("d", 5)},
        {"role": "distractors", **file("m", 4, dtype="float16")},
        {"role": "distractors", **file("n", 3)},
    ]
    unknown = (
        "crop",
        "scales",
        "scale_pooling",
        "input_size",
        "interpolation",
        "whitening",
        "encoder_fingerprint",
        "shards",
    )
    assert {tree[name] for name in (*unknown, "transform_fingerprint")} == {UNKNOWN}
    assert {tree[name] for name in ("index_fingerprint", "index_type", "search_parameters")} == {NONE}


def test_every_field_is_in_the_json_of_every_record(made: tuple[EmbeddingSet, PublishedIndex]) -> None:
    bare = record_of_files("x", "y", {"queries": [file("q", 2)]}, ground_truth="abc", ties="index")
    names = [field.name for field in fields(ProtocolRecord)]
    for record in (bare, of_embeddings(made[0].manifest), replace(bare, scales=(1.0, 0.5), files=())):
        tree = record.as_json()
        assert list(tree) == names
        assert json.loads(json.dumps(tree, allow_nan=False)) == tree
        assert None not in tree.values()
        assert tree["versions"] == versions()


def test_the_chain_records_what_it_knows(made: tuple[EmbeddingSet, PublishedIndex]) -> None:
    embeddings, index = made
    record = of_embeddings(
        embeddings.manifest,
        index=index.manifest,
        search=SearchParameters(k=7),
        expected={"gallery": 31},
    )
    assert record.counts == {"gallery": PictureCounts(31, 30, 0)}
    assert record.vector_dtypes == {"gallery": "float16"}
    assert record.encoder_fingerprint == embeddings.manifest.parents["encoder"]
    assert record.transform_fingerprint == SETTINGS.input.fingerprint
    assert record.shards == {"gallery": embeddings.manifest.parents["shards"]}
    assert record.files == [{"role": "gallery", "embedding_set": embeddings.fingerprint}]
    assert (record.index_fingerprint, record.index_type) == (index.fingerprint, "Flat")
    assert record.search_parameters == {"k": 7, "exact": False, "effort": index.manifest.details["default_effort"]}
    assert (record.scales, record.scale_pooling) == ([1.0, 0.5], "mean")
    assert record.interpolation == "bilinear, antialiased"
    assert record.input_size == "longer side reduced to 32 pixels, shape kept, never enlarged"
    assert record.crop == "whole pictures"
    exact = of_embeddings(embeddings.manifest, index=index.manifest, search=SearchParameters(exact=True))
    assert exact.search_parameters == {"k": 10, "exact": True}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (SearchParameters(k=7), {"k": 7, "exact": False, "effort": {"num_probes": 4, "candidates_per_hit": 2}}),
        (SearchParameters(recall=0.9), {"k": 10, "exact": False, "effort": {"num_probes": 2, "candidates_per_hit": 1}}),
        (SearchParameters(recall=0.99), {"k": 10, "exact": True}),
        (SearchParameters(recall=0.9, exact=True), {"k": 10, "exact": True}),
        (
            SearchParameters(recall=0.9, effort=Effort(num_probes=5)),
            {"k": 10, "exact": False, "effort": {"num_probes": 5, "candidates_per_hit": 1}},
        ),
    ],
)
def test_a_search_is_recorded_as_the_index_understood_it(
    made: tuple[EmbeddingSet, PublishedIndex], search: SearchParameters, expected: dict[str, Any]
) -> None:
    embeddings, index = made
    curve = [
        {"effort": {"num_probes": 1, "candidates_per_hit": 1}, "recall": 0.7},
        {"effort": {"num_probes": 2, "candidates_per_hit": 1}, "recall": 0.92},
        {"effort": {"num_probes": 4, "candidates_per_hit": 2}, "recall": 0.98},
    ]
    details = {**index.manifest.details, "recall_curve": curve, "default_effort": curve[2]["effort"]}
    measured = replace(index.manifest, details=details)
    assert of_embeddings(embeddings.manifest, index=measured, search=search).search_parameters == expected


@pytest.mark.parametrize(
    "search", [SearchParameters(filter=OneOf("split", ("test",))), SearchParameters(among=IdSelection.all_but([1]))]
)
def test_a_search_of_a_part_of_the_gallery_is_no_benchmark(
    made: tuple[EmbeddingSet, PublishedIndex], search: SearchParameters
) -> None:
    embeddings, index = made
    with pytest.raises(ValueError, match="ranks the whole gallery"):
        of_embeddings(embeddings.manifest, index=index.manifest, search=search)


def test_distractors_of_an_embedding_set_are_counted(made: tuple[EmbeddingSet, PublishedIndex]) -> None:
    manifest = made[0].manifest
    both = record_of_embeddings(
        "x", "y", {"gallery": manifest, "distractors": manifest}, SETTINGS, ground_truth="", ties="", crop=""
    )
    assert (both.num_distractors, of_embeddings(manifest).num_distractors) == (30, 0)


def test_parts_that_do_not_belong_together_are_refused(made: tuple[EmbeddingSet, PublishedIndex]) -> None:
    manifest, index = made[0].manifest, made[1].manifest
    foreign = replace(manifest, details={**manifest.details, "encoder_fingerprint": "f" * 64})
    with pytest.raises(ManifestMismatch, match=r"need one encoder fingerprint, found queries .*, gallery ffffffffffff"):
        record_of_embeddings(
            "x", "y", {"queries": manifest, "gallery": foreign}, SETTINGS, ground_truth="", ties="", crop=""
        )
    with pytest.raises(ManifestMismatch, match="the encoder's settings describe"):
        record_of_embeddings(
            "x",
            "y",
            {"gallery": manifest},
            EncoderSettings(backbone="resnet10t"),
            ground_truth="",
            ties="",
            crop="",
        )
    with pytest.raises(ManifestMismatch, match="Build the index from the gallery"):
        of_embeddings(foreign, index=index, search=SearchParameters())
    with pytest.raises(ValueError, match="recorded together"):
        of_embeddings(manifest, index=index)
    with pytest.raises(ValueError, match="needs an embedding set"):
        record_of_embeddings("x", "y", {}, SETTINGS, ground_truth="", ties="", crop="")


def test_input_sizes_are_told_apart() -> None:
    assert input_size_rule(InputSettings(size=64)) == "resized to a square of 64 pixels"
    assert (
        input_size_rule(InputSettings(size=224, resize_to=256))
        == "shorter side resized to 256 pixels, centre square of 224"
    )


def test_the_whitening_of_an_embedding_set_is_told(made: tuple[EmbeddingSet, PublishedIndex]) -> None:
    manifest = made[0].manifest
    assert of_embeddings(manifest).whitening.startswith("none after the encoder")
    whitening = dump_settings(WhiteningSettings(method="learned", dim=64))
    whitened = replace(manifest, details={**manifest.details, "whitening": whitening})
    assert of_embeddings(whitened).whitening == (
        "learned, dimensions kept: 64, shrinkage 0.0, variance to the power 0.5"
    )
