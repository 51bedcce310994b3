"""Benchmarks from shards to numbers, offline and through a real server on a real socket: both must agree."""

import json
import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from data_pipelines.sources.registry import open_data_set
from evaluation.__main__ import app
from evaluation.benchmarks import ClassBenchmark, LandmarkBenchmark, RetrievalBenchmark, find_benchmark
from evaluation.embedding_sets import evaluate_embedding_sets
from evaluation.outputs import Outputs
from evaluation.result import Result, read_result
from evaluation.run import RunOptions, evaluate_run
from evaluation.served_gallery import ServedGallery
from evaluation.url import UrlOptions, evaluate_url
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.settings import IndexSettings
from indexing.sources.embeddings import EmbeddingSource
from lookalike.api_answers import Hit, Item
from lookalike.api_client import ApiClient
from lookalike.encoder import Encoder, create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.errors import ArtifactError, DataError, ManifestMismatch, ResourceError, SettingsError
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.safety.key_file import add_key
from serving.settings import ServingSettings
from tests.drawn_pictures import draw_class_folders, draw_picture

CLASSES = ClassBenchmark("classes", ks=(1, 2, 5), gallery_split="test")
OXFORD = LandmarkBenchmark("roxford5k", num_database=24)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=16, input=InputSettings(size=32)))


@contextmanager
def served(index: Path, **settings: object) -> Iterator[str]:
    app = create_app(QueryEngine.open(index), ServingSettings(index=index, **settings))  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
    assert not thread.is_alive()


def run(benchmark: object, encoder: Encoder, shards: Path, options: RunOptions, **outputs: object) -> Result:
    file = options.out / "result.json"
    with ShardSet.open(shards) as shard_set:
        evaluate_run(benchmark, encoder, shard_set, options, Outputs(file, **outputs))  # type: ignore[arg-type]
    return read_result(file)


def index_of(embeddings: Path, folder: Path, index_type: str = "Flat") -> Path:
    build_index(EmbeddingSource.open(embeddings), folder, IndexSettings(type=index_type))
    return folder


# Pictures with classes


@pytest.fixture(scope="module")
def classes_run(encoder: Encoder, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classes_run")
    run(CLASSES, encoder, shards_folder, RunOptions(out), report=out / "report")
    return out


def test_a_run_leaves_numbers_a_report_and_embeddings_to_go_on_from(
    classes_run: Path, encoder: Encoder, shards_folder: Path
) -> None:
    result = read_result(classes_run / "result.json")
    section = result.sections["leave_one_out"]
    embeddings = EmbeddingSet.open(classes_run / "embeddings" / "test")
    vectors = embeddings.vectors().astype(np.float64)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -2)
    with ShardSet.open(shards_folder) as shard_set:
        labels = shard_set.labels[embeddings.ids]
    assert section.mean("hit_rate@1") == pytest.approx((labels[scores.argmax(1)] == labels).mean())
    record = result.record
    assert record["encoder_fingerprint"] == encoder.fingerprint
    assert (record["crop"], record["index_type"]) == ("whole pictures", "none")
    page = (classes_run / "report" / "report.html").read_text()
    assert page.count('<section class="gallery"') == 12
    before = (classes_run / "embeddings" / "test" / "manifest.json").stat().st_mtime_ns
    again = run(CLASSES, encoder, shards_folder, RunOptions(classes_run), previous=(classes_run / "report",))
    assert (classes_run / "embeddings" / "test" / "manifest.json").stat().st_mtime_ns == before
    assert again.sections["leave_one_out"].mean("map@r") == pytest.approx(section.mean("map@r"))


def test_queries_of_another_split_are_a_protocol_of_its_own(
    encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    benchmark = find_benchmark("classes", ks=(1,), gallery_split="test", query_split="test")
    result = run(benchmark, encoder, shards_folder, RunOptions(tmp_path))
    assert list(result.sections) == ["query_gallery"]
    # Both splits are the same pictures: each is removed from its own ranking by id.
    assert result.sections["query_gallery"].facts["num_in_gallery_too"] == 30
    strangers = find_benchmark("classes", ks=(1,), gallery_split="test", query_split="train")
    with pytest.raises(DataError, match="no query has a picture of its class"):
        run(strangers, encoder, shards_folder, RunOptions(tmp_path))


def test_an_index_and_a_server_give_the_numbers_of_brute_force_and_bounds_of_the_rest(
    classes_run: Path, encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    exact = read_result(classes_run / "result.json").sections["leave_one_out"]
    index = index_of(classes_run / "embeddings" / "test", tmp_path / "index")
    by_index = run(CLASSES, encoder, shards_folder, RunOptions(tmp_path / "run", index=index)).sections["leave_one_out"]
    assert by_index.facts["recall_of_index_at_5"] == 100
    with served(index) as url:
        file = tmp_path / "live.json"
        options = UrlOptions(url, shards_folder, offline=classes_run / "result.json", is_exact=True)
        _, lines = evaluate_url(CLASSES, options, Outputs(file))
        for split in (None, "train"):  # None: a gallery that holds the server's, where every number would be wrong
            what = r"holds 30 pictures, the gallery has \d+ \(.*exactly split 'test': give --gallery-split test\."
            with pytest.raises(ManifestMismatch, match=what):
                evaluate_url(replace(CLASSES, gallery_split=split), options, Outputs(tmp_path / "other.json"))
        assert not (tmp_path / "other.json").exists()
    live = read_result(file)
    for section in (by_index, live.sections["leave_one_out"]):
        for metric in ("hit_rate@1", "hit_rate@5", "recall@2", "map@r", "r_precision"):
            assert section.mean(metric) == pytest.approx(exact.mean(metric), abs=1e-9)
        low, high = section.bounds["map"].T
        assert (low <= exact.per_query["map"] + 1e-9).all()
        assert (high >= exact.per_query["map"] - 1e-9).all()
    assert "live minus offline, leave_one_out map@r: +0.00" in lines
    assert live.record["search_parameters"] == {"k": 6, "exact": True}


def test_pictures_added_to_a_server_are_left_out_and_said_and_deleted_ones_are_missed(
    classes_run: Path, shards_folder: Path, tmp_path: Path
) -> None:
    exact = read_result(classes_run / "result.json").sections["leave_one_out"]
    index = index_of(classes_run / "embeddings" / "test", tmp_path / "index")
    embeddings = EmbeddingSet.open(classes_run / "embeddings" / "test")
    vectors, ids = embeddings.vectors(), embeddings.ids
    with ShardSet.open(shards_folder) as shard_set:
        taken = np.setdiff1d(shard_set.rows("train"), ids)[:1].tolist()  # an id of another split
    options = UrlOptions("", shards_folder, is_exact=True)
    with served(index, allows_writes=True) as url, ApiClient(url) as client:
        # Copies of queries stand before everything else in their lists.
        for id, vector in zip((*taken, None, None), vectors, strict=False):
            client.add(vector=vector.tolist(), id=id, metadata={"key": "mine"})
        evaluate_url(CLASSES, replace(options, url=url), Outputs(tmp_path / "live.json"))
        live = read_result(tmp_path / "live.json")
        for metric in ("hit_rate@1", "hit_rate@5", "recall@2", "map@r", "r_precision"):
            np.testing.assert_allclose(
                live.sections["leave_one_out"].per_query[metric], exact.per_query[metric], atol=1e-9
            )
        assert "that are not in the shards (3), such as those added" in " ".join(live.warnings)
        assert live.record["counts"]["gallery"]["found"] == 30
        assert live.record["search_parameters"] == {"k": 9, "exact": True}
        client.delete(int(ids[0]))
        what = "holds 32 pictures, the gallery has 30 .* 29 are in this gallery, 0 in other splits, and 3 are not in"
        with pytest.raises(ManifestMismatch, match=what):
            evaluate_url(CLASSES, replace(options, url=url), Outputs())


def test_pictures_that_come_while_a_server_is_evaluated_are_named(shards_folder: Path) -> None:
    with ShardSet.open(shards_folder) as shard_set:
        rows = shard_set.rows("test")
        keys = {int(row): shard_set.key(row) for row in rows}
        items = [Item(row, key, None, None, None, {}, None) for row, key in keys.items()]
        gallery = ServedGallery.of(items, shard_set, "test", "http://server")
    first, second = list(keys)[:2]
    assert gallery((Hit(second, 0.9, keys[second]), Hit(first, 0.8, keys[first]))).tolist() == [second, first]
    for late in (Hit(10_000, 0.9, "new"), Hit(first, 0.9, "another")):
        with pytest.raises(ManifestMismatch, match=f"picture {late.id} .*{late.key}.*changed meanwhile"):
            gallery((late,))


def test_a_server_with_keys_is_asked_with_one(
    classes_run: Path, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(classes_run / "embeddings" / "test", tmp_path / "index")
    secret = add_key(tmp_path / "keys", "reader", ("read",), today="2026-01-31")
    result = tmp_path / "live.json"
    with served(index, keys=tmp_path / "keys") as url:
        for key, what in ((None, "wants an API key"), (f"{secret[:-4]}aaaa", "does not know the API key")):
            with pytest.raises(ResourceError, match=f"{what}.*--key, or in the environment variable LOOKALIKE_API_KEY"):
                evaluate_url(CLASSES, UrlOptions(url, shards_folder, api_key=key), Outputs())
        command = ["url", url, "classes", "--shards", str(shards_folder), "--gallery-split", "test", "--ks", "1"]
        for given in (["--key", secret], []):
            if not given:
                monkeypatch.setenv("LOOKALIKE_API_KEY", secret)
            app([*command, *given, "--json", str(result)], standalone_mode=False)
            assert "leave_one_out" in read_result(result).sections
            assert secret not in result.read_text()
            result.unlink()


def test_an_index_and_brute_force_have_the_same_queries_where_a_class_has_one_picture(
    encoder: Encoder, tmp_path: Path
) -> None:
    draw_class_folders(tmp_path / "pictures", range(4), pictures_per_class=3)
    for lonely in (1, 2):
        (tmp_path / "pictures" / "class00" / f"{lonely}.png").unlink()
    source = ClassFolders(ClassFoldersSettings(folder=tmp_path / "pictures"))
    write_shards(source, tmp_path / "shards", ShardSettings()).close()
    everything = replace(CLASSES, gallery_split=None)
    exact = run(everything, encoder, tmp_path / "shards", RunOptions(tmp_path / "exact"))
    index = index_of(tmp_path / "exact" / "embeddings" / "all", tmp_path / "index")
    options = RunOptions(tmp_path / "by_index", index=index)
    by_index = run(everything, encoder, tmp_path / "shards", options, previous=(tmp_path / "exact" / "result.json",))
    names = exact.sections["leave_one_out"].query_names
    assert len(names) == 9
    assert by_index.sections["leave_one_out"].query_names == names
    with served(index) as url:
        evaluate_url(everything, UrlOptions(url, tmp_path / "shards"), Outputs(tmp_path / "live.json"))
    assert read_result(tmp_path / "live.json").sections["leave_one_out"].query_names == names
    sets = [tmp_path / name / "embeddings" / "all" for name in ("by_index", "exact")]
    summary, _ = evaluate_embedding_sets(sets, index_folder=index)
    [lead] = summary["lead"].values()
    assert (lead["map@r"]["wins"], lead["map@r"]["losses"]) == (0, 0)


def test_a_folder_of_somebody_elses_is_left_alone(encoder: Encoder, shards_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="other than a run of a benchmark"):
        run(CLASSES, encoder, shards_folder, RunOptions(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_no_server_and_foreign_indexes_are_named(encoder: Encoder, shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1:9"):
        evaluate_url(CLASSES, UrlOptions("http://127.0.0.1:9", shards_folder), Outputs())
    with pytest.raises(SettingsError, match="is not the address of a server"):
        evaluate_url(CLASSES, UrlOptions("127.0.0.1:9", shards_folder), Outputs())
    run(replace(CLASSES, gallery_split="train"), encoder, shards_folder, RunOptions(tmp_path / "train"))
    index = index_of(tmp_path / "train" / "embeddings" / "train", tmp_path / "index")
    with pytest.raises(ManifestMismatch, match="was made from embeddings"):
        run(CLASSES, encoder, shards_folder, RunOptions(tmp_path / "r", index=index))


def test_options_without_effect_are_refused(encoder: Encoder, shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no use for --solution"):
        run(CLASSES, encoder, shards_folder, RunOptions(tmp_path, solution=tmp_path / "s.csv"))
    with pytest.raises(SettingsError, match="needs --ground-truth"):
        run(OXFORD, encoder, shards_folder, RunOptions(tmp_path))
    with pytest.raises(SettingsError, match="choose from sop"):
        find_benchmark("sopp")
    with pytest.raises(SettingsError, match="own k"):
        find_benchmark("roxford5k", ks=(1,))


def test_a_random_gallery_is_left_out_where_an_index_ranks(
    classes_run: Path, encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    both = replace(CLASSES, protocols=("leave_one_out", "random_gallery"))
    exact = run(both, encoder, shards_folder, RunOptions(tmp_path / "exact"))
    assert list(exact.sections) == ["leave_one_out", "random_gallery"]
    index = index_of(classes_run / "embeddings" / "test", tmp_path / "index")
    by_index = run(both, encoder, shards_folder, RunOptions(tmp_path / "index_run", index=index))
    assert list(by_index.sections) == ["leave_one_out"]
    assert any("random_gallery was left out" in warning for warning in by_index.warnings)


def test_classes_that_were_learned_from_are_warned_of(encoder: Encoder, shards_folder: Path, tmp_path: Path) -> None:
    options = RunOptions(tmp_path, training_shards=shards_folder)
    train = run(replace(CLASSES, gallery_split="train"), encoder, shards_folder, options)
    assert any("identical" in warning or "same" in warning or "class" in warning for warning in train.warnings)


# Landmarks


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout in miniature: 24 pictures of 6 landmarks, and a query of each, of which a box counts."""
    root = tmp_path_factory.mktemp("landmarks")
    folder = root / "roxford5k" / "jpg"
    folder.mkdir(parents=True)
    names = [f"landmark{n // 4}_{n:06d}" for n in range(24)]
    for number, name in enumerate(names):
        draw_picture(number // 4, number).save(folder / f"{name}.jpg")
    queries = [f"query_{n:06d}" for n in range(6)]
    for number, name in enumerate(queries):
        draw_picture(number, 100 + number).save(folder / f"{name}.jpg")
    gnd = [
        {"bbx": [4.5, 3.5, 40.5, 37.2], "easy": [4 * n, 4 * n + 1], "hard": [4 * n + 2], "junk": [4 * n + 3]}
        for n in range(6)
    ]
    truth = pickle.dumps({"imlist": names, "qimlist": queries, "gnd": gnd}, protocol=2)
    (root / "roxford5k" / "gnd_roxford5k.pkl").write_bytes(truth)
    source = open_data_set("roxford5k", root)
    write_shards(source, root / "shards", ShardSettings()).close()
    return root


def test_landmarks_run_from_the_official_folder_to_all_setups_and_live_equals_offline(
    landmarks: Path, encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    truth = landmarks / "roxford5k" / "gnd_roxford5k.pkl"
    options = RunOptions(tmp_path, ground_truth=truth)
    offline = run(OXFORD, encoder, landmarks / "shards", options, report=tmp_path / "report")
    assert list(offline.sections) == ["easy", "medium", "hard"]
    assert offline.record["counts"]["gallery"] == {"expected": 24, "found": 24, "failed": 0}
    assert "box" in offline.record["crop"]
    queries, gallery = (
        EmbeddingSet.open(tmp_path / "embeddings" / name).vectors().astype(np.float64) for name in ("query", "gallery")
    )
    for query, scores in enumerate(queries @ gallery.T):
        kept = [row for row in np.argsort(-scores) if row != 4 * query + 3]
        places = [kept.index(4 * query + n) for n in range(3)]
        expected = np.mean([place < 5 for place in places])
        assert offline.sections["medium"].per_query["mr@5"][query] == pytest.approx(expected)
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('<section class="gallery"') == 6
    assert "data:image/jpeg" in page
    index = index_of(tmp_path / "embeddings" / "gallery", tmp_path / "index")
    by_index = run(OXFORD, encoder, landmarks / "shards", RunOptions(tmp_path / "i", ground_truth=truth, index=index))
    with served(index) as url:
        for name, options_of_url in {
            "folder": UrlOptions(url, folder=landmarks, ground_truth=truth),
            "shards": UrlOptions(url, shards=landmarks / "shards", ground_truth=truth),
        }.items():
            file = tmp_path / f"{name}.json"
            told = evaluate_url(OXFORD, replace(options_of_url, offline=tmp_path / "result.json"), Outputs(file))[1]
            live = read_result(file)
            assert "live minus offline, hard map: +0.00" in told
            for setup, section in live.sections.items():
                for metric, values in offline.sections[setup].per_query.items():
                    np.testing.assert_allclose(section.per_query[metric], values, atol=1e-12)
                    np.testing.assert_allclose(by_index.sections[setup].per_query[metric], values, atol=1e-12)
        with pytest.raises(SettingsError, match="--folder"):
            evaluate_url(OXFORD, UrlOptions(url, ground_truth=truth), Outputs())
    run(replace(CLASSES, gallery_split=None), encoder, shards_folder, RunOptions(tmp_path / "foreign"))
    foreign = index_of(tmp_path / "foreign" / "embeddings" / "all", tmp_path / "foreign_index")
    with served(foreign) as url, pytest.raises(ManifestMismatch, match="its index holds something else"):
        evaluate_url(OXFORD, UrlOptions(url, folder=landmarks, ground_truth=truth), Outputs())
    with ShardSet.open(landmarks / "shards") as shard_set:
        everything = embed_shards(encoder, shard_set, tmp_path / "everything")
    index = index_of(everything.folder, tmp_path / "index_of_everything")
    with served(index) as url, pytest.raises(ManifestMismatch, match="holds the query"):
        evaluate_url(OXFORD, UrlOptions(url, folder=landmarks, ground_truth=truth), Outputs())


def test_distractors_join_from_their_own_shards_and_missing_pictures_are_named(
    landmarks: Path, encoder: Encoder, shards_folder: Path, tmp_path: Path
) -> None:
    truth = landmarks / "roxford5k" / "gnd_roxford5k.pkl"
    alone = run(OXFORD, encoder, landmarks / "shards", RunOptions(tmp_path, ground_truth=truth))
    options = RunOptions(tmp_path, ground_truth=truth, distractors=shards_folder)
    among = run(OXFORD, encoder, landmarks / "shards", options, report=tmp_path / "report")
    assert "class0" in (tmp_path / "report" / "report.html").read_text(), "a distractor stands among the first ten"
    assert among.record["num_distractors"] == 60
    assert [point.num_distractors for point in among.curve] == [0, 60]
    assert among.curve[0].maps["hard"] == pytest.approx(alone.sections["hard"].mean("map"))
    assert among.sections["hard"].mean("map") <= alone.sections["hard"].mean("map") + 1e-12
    tree = pickle.loads(truth.read_bytes())
    tree["imlist"][5] = "landmark_that_is_not_there"
    (tmp_path / "other.pkl").write_bytes(pickle.dumps(tree, protocol=2))
    with pytest.raises(DataError, match=r"lacks 1 of 24 pictures .* landmark_that_is_not_there"):
        run(OXFORD, encoder, landmarks / "shards", RunOptions(tmp_path, ground_truth=tmp_path / "other.pkl"))
    official = LandmarkBenchmark("roxford5k", num_database=4_993)
    with pytest.raises(DataError, match="lists 24 pictures, roxford5k has 4993"):
        run(official, encoder, landmarks / "shards", RunOptions(tmp_path, ground_truth=truth))


# Google Landmarks


@pytest.fixture(scope="module")
def google_landmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gldv2")
    names = {"index": [f"{n:016x}" for n in range(100, 112)], "test": [f"{n:016x}" for n in range(200, 204)]}
    for part, own in names.items():
        for number, name in enumerate(own):
            path = root / part / name[0] / name[1] / name[2] / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_picture(number % 4, number + 50 * (part == "test")).save(path)
    rows = ["id,images,Usage"]
    for number, name in enumerate(names["test"][:3]):
        usage = "Public" if number == 0 else "Private"
        rows.append(f"{name},{' '.join(names['index'][number::4])},{usage}")
    rows.append(f"{names['test'][3]},None,Ignored")
    (root / "solution.csv").write_text("\n".join(rows) + "\n")
    source = open_data_set("gldv2", root, ["parts=[index,test]"])
    write_shards(source, root / "shards", ShardSettings()).close()
    return root


def test_google_landmarks_gives_a_submission_and_its_score_offline_and_live(
    google_landmarks: Path, encoder: Encoder, tmp_path: Path
) -> None:
    benchmark, solution = RetrievalBenchmark(), google_landmarks / "solution.csv"
    options = RunOptions(tmp_path, solution=solution)
    result = run(benchmark, encoder, google_landmarks / "shards", options, report=tmp_path / "report")
    assert {name: len(section.query_names) for name, section in result.sections.items()} == {"public": 1, "private": 2}
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines[0] == "id,images"
    assert all(len(line.partition(",")[2].split()) == 12 for line in lines[1:])
    with pytest.raises(SettingsError, match=r"submission\.csv is written"):
        run(benchmark, encoder, google_landmarks / "shards", RunOptions(tmp_path / "unscored"))
    index = index_of(tmp_path / "embeddings" / "index", tmp_path / "published")
    by_index = run(benchmark, encoder, google_landmarks / "shards", replace(options, out=tmp_path / "i", index=index))
    with served(index) as url:
        live_options = UrlOptions(url, google_landmarks / "shards", solution=solution)
        evaluate_url(benchmark, live_options, Outputs(tmp_path / "live.json"))
    live = read_result(tmp_path / "live.json")
    for name, section in result.sections.items():
        for other in (by_index, live):
            expected = section.per_query["map@100"]
            np.testing.assert_allclose(other.sections[name].per_query["map@100"], expected, atol=1e-12)
    assert json.loads((tmp_path / "result.json").read_text())["public"]["map@100"] > 0
