import asyncio
import base64
import datetime
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient

from data_pipelines.decode import decode_image
from data_pipelines.transforms import EvaluationTransform
from indexing.building.build import build_index
from indexing.published_index import PublishedIndex
from indexing.reranking.registry import search_and_rerank
from indexing.reranking.settings import METHOD_NAMES, parse_rerank
from indexing.sources.arrays import ArraySource
from lookalike.encoder import embed_pixels
from lookalike.errors import ArtifactError, ManifestMismatch
from lookalike.exact_search import exact_search
from lookalike.id_selection import IdSelection
from lookalike.records import SearchHits, SearchParameters
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.unit.serving.small_index import LOCAL, NUM_PICTURES, SmallIndex

# Scores go through JSON as the shortest decimal of a float32; a vector scaled to unit length again moves its last bit.
SCORE_TOLERANCE = 1e-6


def found(answer: httpx2.Response) -> tuple[list[int], list[float]]:
    assert answer.status_code == 200, answer.text
    hits = answer.json()["hits"]
    return [hit["id"] for hit in hits], [hit["score"] for hit in hits]


def search(client: TestClient, **query: Any) -> tuple[list[int], list[float]]:
    return found(client.post("/v1/search", json=query))


def brute_force(engine: QueryEngine, vector: np.ndarray, *, k: int) -> SearchHits:
    index = engine.index
    return exact_search(vector[None], index.store.vectors, index.ids(), k=k)


def embed(engine: QueryEngine, picture: bytes) -> np.ndarray:
    encoder = engine.index.load_encoder()
    pixels = EvaluationTransform(encoder.settings.input)(decode_image(picture))
    return embed_pixels(encoder, torch.from_numpy(pixels)[None]).numpy()[0]


def test_a_picture_finds_what_brute_force_finds(
    client: TestClient, engine: QueryEngine, small_index: SmallIndex
) -> None:
    picture = (small_index.pictures / "ring" / "teal.png").read_bytes()
    expected = brute_force(engine, embed(engine, picture), k=7)
    for answer in (
        client.post("/v1/search", files={"image": ("teal.png", picture)}, data={"k": 7}),
        client.post("/v1/search", files={"image": ("teal.png", picture)}, data={"k": 7, "exact": "true"}),
        client.post("/v1/search", json={"image": base64.b64encode(picture).decode(), "k": 7}),
    ):
        ids, scores = found(answer)
        assert ids == expected.ids[0].tolist()
        np.testing.assert_allclose(scores, expected.scores[0], atol=SCORE_TOLERANCE)
    assert answer.json()["hits"][0]["key"] == "ring/teal"


def test_a_region_finds_what_its_own_picture_finds(client: TestClient, small_index: SmallIndex) -> None:
    picture = (small_index.pictures / "ring" / "gold.jpg").read_bytes()
    cut = io.BytesIO()
    decode_image(picture).crop((12, 0, 88, 50)).save(cut, format="PNG")
    expected = found(client.post("/v1/search", files={"image": cut.getvalue()}, data={"k": 5}))
    whole = found(client.post("/v1/search", files={"image": picture}, data={"k": 5}))
    assert whole != expected
    # Halves are rounded to even, and what lies beyond the edges is cut off.
    for left, top, right, bottom in ((12, 0, 88, 50), (12.5, -0.25, 87.5, 50.49), (11.6, -1e9, 88.4, 50)):
        roi = f"{left},{top}, {right},{bottom}"
        for spelled in (roi, f" [{roi}]"):
            answer = client.post("/v1/search", files={"image": picture}, data={"k": 5, "roi": spelled})
            assert found(answer) == expected
        assert search(client, image=base64.b64encode(picture).decode(), roi=[left, top, right, bottom], k=5) == expected


def test_an_answer_says_what_searched_and_how_long_each_stage_took(client: TestClient, small_index: SmallIndex) -> None:
    with (small_index.pictures / "disc" / "gold.jpg").open("rb") as picture:
        response = client.post("/v1/search", files={"image": picture})
    answer, info = response.json(), client.get("/v1/info").json()
    assert answer["index_version"] == info["index_version"] == "v0001"
    assert answer["encoder_fingerprint"] == info["encoder_fingerprint"]
    assert answer["request_id"] == response.headers["x-request-id"]
    timings = answer["timings_ms"]
    assert list(timings) == ["decode", "encode", "search", "metadata", "queue", "total"]
    assert sum(timings.values()) == pytest.approx(2 * timings["total"], abs=0.01)  # rounded to microseconds
    first = answer["hits"][0]
    assert first | {"score": 1} == {
        "id": first["id"],
        "key": "disc/gold",
        "class_name": "disc",
        "width": 96,
        "height": 96,
        "metadata": {"label": 0, "split": "all"},
        "image_url": f"/v1/items/{first['id']}/image?picture={first['image_url'][-12:]}",
        "score": 1,
    }


def test_a_vector_finds_the_same_at_any_length(client: TestClient, engine: QueryEngine) -> None:
    vector = np.random.default_rng(3).normal(size=engine.index.dim).astype(np.float32)
    expected = brute_force(engine, vector / np.linalg.norm(vector), k=5)
    # 1e-300 and 1e300 have squares that no float holds.
    for scale in (1.0, 1e-300, 1e300):
        ids, scores = search(client, vector=(vector.astype(np.float64) * scale).tolist(), k=5)
        assert ids == expected.ids[0].tolist()
        np.testing.assert_allclose(scores, expected.scores[0], atol=SCORE_TOLERANCE)


def test_an_id_does_not_find_itself_unless_asked(client: TestClient, engine: QueryEngine) -> None:
    expected = brute_force(engine, engine.index.vectors_of(np.array([9]))[0], k=6).ids[0].tolist()
    assert search(client, id=9, k=6, include_self=True)[0] == expected
    assert search(client, id=9, k=5)[0] == [id for id in expected if id != 9]


def test_a_filter_finds_what_brute_force_finds_among_what_fits(client: TestClient, engine: QueryEngine) -> None:
    index = engine.index
    classes = np.array([row["class_name"] for row in index.metadata_of(index.ids())])
    vector = index.vectors_of(np.array([9]))[0]
    round_ones = {"column": "class_name", "in": ["disc", "ring"]}
    for condition, fits in (
        (round_ones, np.isin(classes, ["disc", "ring"])),
        ({"not": round_ones}, ~np.isin(classes, ["disc", "ring"])),
        ({"all": [{"column": "label", "at_least": 2}, {"column": "split", "equals": "all"}]}, classes >= "square"),
        ({"column": "class_name", "equals": "cat"}, classes == "cat"),
    ):
        ids = index.ids()[fits]
        expected = exact_search(vector[None], index.vectors_of(ids), ids, k=30).ids[0, : len(ids)].tolist()
        assert search(client, id=9, k=30, filter=condition, include_self=True)[0] == expected
        assert search(client, id=9, k=30, filter=condition)[0] == [id for id in expected if id != 9]


def test_a_second_look_is_that_of_the_method_without_the_query_itself(client: TestClient, engine: QueryEngine) -> None:
    index = engine.index
    vector = index.vectors_of(np.array([9]))
    for method in (*METHOD_NAMES, {"name": "k_reciprocal", "num_neighbours": 7, "cosine_share": 0.5}):
        for k, others in ((5, IdSelection.all_but([9])), (30, IdSelection.all_but([9]))):
            parameters = SearchParameters(k=k, among=others)
            expected = search_and_rerank(index, vector, parameters, parse_rerank(method))
            ids, scores = search(client, id=9, k=k, rerank=method)
            assert ids == expected.ids[0][expected.ids[0] >= 0].tolist()
            np.testing.assert_allclose(scores, expected.scores[0, : len(ids)], atol=SCORE_TOLERANCE)
    timings = client.post("/v1/search", json={"id": 9, "rerank": "diffusion"}).json()["timings_ms"]
    assert list(timings) == ["search", "rerank", "metadata", "queue", "total"]


def test_a_form_says_as_much_as_json(client: TestClient, small_index: SmallIndex) -> None:
    picture = (small_index.pictures / "ring" / "teal.png").read_bytes()
    image = base64.b64encode(picture).decode()
    for how in (
        {"recall": 0.5},
        {
            "filter": {
                "any": [{"column": "class_name", "equals": "disc"}, {"column": "key", "in": ["ring/gold, or so"]}]
            }
        },
        {"rerank": "average_query_expansion"},
        {"rerank": {"name": "diffusion", "alpha": 0.5}, "filter": {"column": "width", "at_most": 96}},
    ):
        parts = {name: json.dumps(part) if isinstance(part, dict) else part for name, part in how.items()}
        by_form = found(client.post("/v1/search", files={"image": picture}, data={"k": 8, **parts}))
        assert by_form == search(client, image=image, k=8, **how)
        assert by_form[0]


FOREIGN_VECTORS = np.eye(6, 8, dtype=np.float32)


@pytest.fixture(scope="module")
def foreign_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("foreign")
    np.save(folder / "vectors.npy", FOREIGN_VECTORS)
    metadata = pa.table(
        {
            "price": [1.5, float("nan"), None, 4.0, float("inf"), 6.0],
            "width": ["5 cm", "6 cm", "7 cm", None, "9 cm", "10 cm"],
            "seen": [datetime.datetime(2024, 5, day + 1, tzinfo=datetime.UTC) for day in range(6)],
            "hash": [b"\xff\x00"] * 6,
        }
    )
    pq.write_table(metadata, folder / "metadata.parquet")
    source = ArraySource(folder / "vectors.npy", metadata=folder / "metadata.parquet")
    build_index(source, folder / "index")
    engine = QueryEngine.open(folder / "index")
    asyncio.run(engine.warm_up())
    with TestClient(create_app(engine, ServingSettings(index=folder / "index")), base_url=LOCAL) as client:
        yield client


class TestVectorsOfAnotherProgram:
    """An index without encoder and pictures, with whatever metadata somebody has."""

    def test_is_searched_by_vector_and_id(self, foreign_client: TestClient) -> None:
        answer = foreign_client.post("/v1/search", json={"vector": FOREIGN_VECTORS[1].tolist(), "k": 1}).json()
        assert answer["encoder_fingerprint"] is None
        (hit,) = answer["hits"]
        metadata = {"price": None, "width": "6 cm", "seen": "2024-05-02T00:00:00Z", "hash": "_wA="}
        assert (hit["id"], hit["score"], hit["key"], hit["class_name"], hit["width"]) == (1, 1.0, "1", None, None)
        assert hit["metadata"] == metadata
        assert search(foreign_client, id=1, filter={"column": "price", "above": 3})[0] == [3, 4, 5]
        assert [item["metadata"]["price"] for item in foreign_client.get("/v1/items?sample=6").json()["items"]].count(
            None
        ) == 3

    def test_pictures_cannot_be_searched_with_or_shown(
        self, foreign_client: TestClient, small_index: SmallIndex
    ) -> None:
        picture = (small_index.pictures / "ring" / "teal.png").read_bytes()
        problem = foreign_client.post("/v1/search", files={"image": picture})
        assert (problem.status_code, problem.json()["code"]) == (422, "encoder.unavailable")
        assert foreign_client.get("/v1/items/1/image").json()["code"] == "pictures.unavailable"
        info = foreign_client.get("/v1/info").json()
        assert (info["encoder_fingerprint"], info["has_pictures"]) == (None, False)
        assert info["metadata_columns"] == ["key", "price", "width", "seen", "hash"]

    def test_shards_do_not_fit_it(self, foreign_client: TestClient, small_index: SmallIndex) -> None:
        engine = foreign_client.app.state.engine  # type: ignore[attr-defined]
        with pytest.raises(ArtifactError, match="was made of vectors"):
            QueryEngine.open(engine.index.folder.parent, shards_folder=small_index.shards)


def test_k_above_the_gallery_gives_all_of_it(client: TestClient) -> None:
    ids, scores = search(client, id=0, k=500, include_self=True)
    assert sorted(ids) == list(range(NUM_PICTURES))
    assert scores == sorted(scores, reverse=True)
    assert len(search(client, id=0, k=500)[0]) == NUM_PICTURES - 1


def test_searches_at_the_same_time_do_not_mix(engine: QueryEngine, small_index: SmallIndex) -> None:
    pictures = [path.read_bytes() for path in sorted(small_index.pictures.glob("*/*.*"))]
    app = create_app(engine, ServingSettings(index=small_index.index))

    async def search_all() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=LOCAL) as client:
            by_picture = [client.post("/v1/search", files={"image": picture}) for picture in pictures]
            by_id = [client.post("/v1/search", json={"id": id, "include_self": True}) for id in range(NUM_PICTURES)]
            return await asyncio.gather(*by_picture, *by_id)

    first_ids = [found(answer)[0][0] for answer in asyncio.run(search_all())]
    assert first_ids == [*range(NUM_PICTURES), *range(NUM_PICTURES)]


def test_an_item_is_described_and_its_picture_is_the_original_file(client: TestClient, small_index: SmallIndex) -> None:
    files = {
        path.with_suffix("").relative_to(small_index.pictures).as_posix(): path
        for path in small_index.pictures.glob("*/*.*")
    }
    for id in range(NUM_PICTURES):
        item = client.get(f"/v1/items/{id}").json()
        path = files.pop(item["key"])
        picture = client.get(item["image_url"])
        assert picture.content == path.read_bytes()
        assert picture.headers["content-type"] == {".png": "image/png", ".jpg": "image/jpeg"}[path.suffix]
        assert picture.headers["x-content-type-options"] == "nosniff"
        assert picture.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert not files


def test_pictures_are_cached_for_good_only_under_the_address_that_names_their_shards(client: TestClient) -> None:
    address = client.get("/v1/items/4").json()["image_url"]
    picture = client.get(address)
    assert "immutable" in picture.headers["cache-control"]
    for other in (address.partition("?")[0], address + "0", "/v1/items/4/image?shards=None"):
        assert client.get(other).headers["cache-control"] == "no-cache"
    again = client.get(address, headers={"If-None-Match": picture.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_seed_gives_the_same_different_items_again(client: TestClient) -> None:
    first, again, other = (client.get(f"/v1/items?sample=9&seed={seed}").json() for seed in (5, 5, 6))
    assert first == again
    assert len({item["id"] for item in first["items"]}) == 9
    assert other["items"] != first["items"]
    unseeded = client.get("/v1/items?sample=200").json()
    assert sorted(item["id"] for item in unseeded["items"]) == list(range(NUM_PICTURES))
    assert client.get(f"/v1/items?sample=200&seed={unseeded['seed']}").json() == unseeded


def test_info_tells_limits_counts_and_the_measured_recall(client: TestClient, engine: QueryEngine) -> None:
    info = client.get("/v1/info").json()
    assert info["num_vectors"] == NUM_PICTURES
    assert info["dim"] == engine.index.dim
    assert info["limits"] == {
        "max_body_bytes": 20 << 20,
        "max_body_seconds": 60.0,
        "max_pixels": 50_000_000,
        "max_side": 30_000,
        "min_side": 1,
        "formats": ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"],
        "max_k": 1000,
        "max_shortlist": 200,
        "max_items": 200,
        "max_queries": 64,
        "max_parts": 16,
        "max_compared_versions": 2,
        "max_batch": 32,
        "max_waiting_pictures": 128,
        "max_waiting_searches": 512,
        "max_waiting_reads": 256,
        "max_waiting_writes": 64,
        "max_wait_seconds": 5.0,
    }
    assert (info["rate_limit"], info["takes_urls"]) == (None, False)
    details = engine.index.manifest.details
    curve = [point | {"effort": known_parts(point["effort"])} for point in info["recall_curve"]]
    assert curve == details["recall_curve"]
    assert known_parts(info["default_effort"]) == details["default_effort"]
    assert info["target_recall"] == details["target_recall"]
    assert info["metadata_columns"] == ["key", "class_name", "label", "split", "width", "height"]
    assert info["rerank_methods"] == list(METHOD_NAMES)
    assert info["has_pictures"] is True
    assert {"python", "torch"} <= info["versions"].keys()


def known_parts(effort: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in effort.items() if value is not None}


def test_the_server_is_ready_only_while_it_runs(small_index: SmallIndex) -> None:
    app = create_app(QueryEngine.open(small_index.index), ServingSettings(index=small_index.index))
    client = TestClient(app, base_url=LOCAL)
    before = client.get("/readyz")
    assert (before.status_code, before.json()["code"]) == (503, "server.not_ready")
    assert before.headers["retry-after"] == "1"
    assert client.get("/livez").json() == {"status": "ok"}
    with client:
        assert client.get("/readyz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 503


def test_without_shards_searching_works_and_pictures_are_said_to_be_missing(
    small_index: SmallIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PublishedIndex, "shards_folder", small_index.shards / "moved away")
    app = create_app(QueryEngine.open(small_index.index), ServingSettings(index=small_index.index))
    with TestClient(app, base_url=LOCAL) as client:
        hits = client.post("/v1/search", json={"id": 3}).json()["hits"]
        assert [hit["image_url"] for hit in hits] == [None] * 10
        assert client.get("/v1/items/3/image").json()["code"] == "pictures.unavailable"
        assert client.get("/v1/items/99/image").json()["code"] == "item.unknown"
        assert client.get("/v1/info").json()["has_pictures"] is False


def test_shards_of_another_gallery_are_refused(small_index: SmallIndex, tmp_path: Path) -> None:
    from data_pipelines.settings import ClassFoldersSettings, ShardSettings
    from data_pipelines.shard_writer import write_shards
    from data_pipelines.sources.class_folders import ClassFolders

    source = ClassFolders(ClassFoldersSettings(folder=small_index.pictures / "disc"))
    write_shards(source, tmp_path / "shards", ShardSettings())
    with pytest.raises(ManifestMismatch, match="shards"):
        QueryEngine.open(small_index.index, shards_folder=tmp_path / "shards")


def test_a_request_id_is_taken_over_if_it_is_harmless(client: TestClient) -> None:
    given = client.get("/livez", headers={"X-Request-ID": "trace-7.a_B"})
    assert given.headers["x-request-id"] == "trace-7.a_B"
    for bad in ("spaces here", "x" * 65, "<script>"):
        assert re.fullmatch(
            r"[0-9a-f]{32}", client.get("/livez", headers={"X-Request-ID": bad}).headers["x-request-id"]
        )


def test_every_kind_of_answer_carries_a_strict_policy(client: TestClient) -> None:
    for path in ("/", "/page/page.js", "/v1/info", "/nothing/here", "/openapi.json"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers


def test_the_page_obeys_its_policy_and_asks_nobody_else(client: TestClient) -> None:
    html = client.get("/").text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in ("page/page.js", "page/page.css", "page/icon.svg"):
        assert name in html
        text = client.get(f"/{name}").text
        assert not re.search(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))


def test_the_openapi_document_is_whole_and_its_examples_work(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for reference in re.findall(r'"#/components/schemas/(\w+)"', client.get("/openapi.json").text):
        assert reference in schemas
    assert "HTTPValidationError" not in schemas  # the framework's own shape of errors, which is never sent
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]
    for schema in schemas.values():
        assert all("description" in field or "$ref" in field for field in schema["properties"].values())
    json_body = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    for name, example in json_body["examples"].items():
        answer = client.post("/v1/search", json=example["value"])
        # The example's vector is shortened; all it can show is its shape.
        assert answer.status_code == 200 or (name, answer.json()["code"]) == ("by a vector", "vector.wrong_dim")
