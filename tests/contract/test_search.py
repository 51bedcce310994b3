"""One list of cases over every way to search: each must answer as a full sort in float64 would.

Ways: brute force by streaming, parts searched apart and merged, a flat and a partitioned FAISS index, a published
index read from disk, the HTTP API, and that API's client.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx2
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from numpy import ndarray

from data_pipelines.settings import ClassFoldersSettings, ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources.class_folders import ClassFolders
from indexing.build import build_index
from indexing.embed import embed_shards
from indexing.faiss_index import FaissSearcher, create_faiss_index
from indexing.published_index import PublishedIndex
from indexing.settings import IndexSettings
from lookalike.api_client import ApiProblem, AsyncApiClient, SearchAnswer
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.exact_search import exact_search, merge_hits
from lookalike.records import SearchHits, SearchParameters
from serving.app import create_app
from serving.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.drawn_pictures import draw_class_folders

Search = Callable[[ndarray, int], SearchHits]
WAYS = ("brute force", "merged parts", "Flat", "IVF2,Flat", "published index", "HTTP", "API client")


@dataclass(frozen=True)
class Gallery:
    vectors: ndarray
    ids: ndarray
    ways: dict[str, Search]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    folder = tmp_path_factory.mktemp("gallery")
    draw_class_folders(folder / "pictures", range(20), pictures_per_class=4)
    # One picture under six names: their vectors are equal, so their scores tie exactly.
    picture = (folder / "pictures" / "class00" / "0.png").read_bytes()
    for copy in range(5):
        (folder / "pictures" / "class01" / f"copy{copy}.png").write_bytes(picture)
    shards = write_shards(ClassFolders(ClassFoldersSettings(folder=folder / "pictures")), folder / "s", ShardSettings())
    torch.manual_seed(0)
    encoder = create_encoder(EncoderSettings(backbone="resnet10t", projection_dim=24, input=InputSettings(size=32)))
    with ShardSet.open(shards.folder) as shard_set:
        embeddings = embed_shards(encoder, shard_set, folder / "embeddings")
    build_index(embeddings, folder / "index", IndexSettings(type="IVF2,Flat", target_recall=0.5))
    vectors, ids = embeddings.vectors(), embeddings.ids
    engine = QueryEngine.open(folder / "index")
    app = create_app(engine, ServingSettings(index=folder / "index"))
    with TestClient(app, base_url="http://localhost") as client:
        yield Gallery(
            vectors,
            ids,
            {
                "brute force": lambda queries, k: exact_search(queries, vectors, ids, k=k),
                "merged parts": lambda queries, k: merge_hits(
                    [exact_search(queries, vectors[part::3], ids[part::3], k=k) for part in range(3)], k=k
                ),
                "Flat": _faiss("Flat", vectors, ids),
                "IVF2,Flat": _faiss("IVF2,Flat", vectors, ids),
                "published index": _exact(PublishedIndex.open(folder / "index").search),
                "HTTP": lambda queries, k: _http(client, queries, k),
                "API client": lambda queries, k: _api_client(httpx2.ASGITransport(app), queries, k),
            },
        )


def _faiss(index_type: str, vectors: ndarray, ids: ndarray) -> Search:
    index = create_faiss_index(index_type, vectors, ids, seed=0)
    return _exact(FaissSearcher(index, index_type=index_type, default_num_probes=1).search)


def _exact(search: Callable[[ndarray, SearchParameters], SearchHits]) -> Search:
    return lambda queries, k: search(queries, SearchParameters(k=k, exact=True))


def _http(client: TestClient, queries: ndarray, k: int) -> SearchHits:
    """Answers without padding: the API returns what there is."""
    rows = []
    for query in queries:
        # Written here, because the client's own encoder refuses NaN, and the server would never be asked.
        body = json.dumps({"vector": query.tolist(), "k": k, "exact": True})
        answer = client.post("/v1/search", content=body, headers={"content-type": "application/json"})
        if answer.status_code != 200:
            raise ValueError(answer.json()["detail"])
        rows.append([(hit["id"], hit["score"]) for hit in answer.json()["hits"]])
    return _padded(rows, k)


def _api_client(transport: httpx2.AsyncBaseTransport, queries: ndarray, k: int) -> SearchHits:
    async def search_all() -> list[SearchAnswer]:
        async with AsyncApiClient("http://localhost", transport=transport) as client:
            return await asyncio.gather(*(client.search(vector=query, k=k, exact=True) for query in queries))

    try:
        answers = asyncio.run(search_all())
    except ApiProblem as problem:
        raise ValueError(problem.detail) from problem
    return _padded([[(hit.id, hit.score) for hit in answer.hits] for answer in answers], k)


def _padded(rows: list[list[tuple[int, float]]], k: int) -> SearchHits:
    ids = np.array([[identifier for identifier, _ in row] + [-1] * (k - len(row)) for row in rows])
    scores = np.array([[score for _, score in row] + [-np.inf] * (k - len(row)) for row in rows], np.float32)
    return SearchHits(ids=ids, scores=scores)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 7, 200])
def test_hits_are_those_of_a_full_sort(gallery: Gallery, way: str, k: int) -> None:
    generator = np.random.default_rng(1)
    queries = gallery.vectors[:6] + 0.3 * generator.normal(size=(6, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    hits = gallery.ways[way](queries, k)
    exact = queries.astype(np.float64) @ gallery.vectors.astype(np.float64).T
    for row, scores in enumerate(exact):
        found = hits.ids[row][hits.ids[row] >= 0]
        assert len(found) == len(set(found.tolist())) == min(k, len(gallery.ids))
        place = {int(identifier): position for position, identifier in enumerate(gallery.ids)}
        found_scores = scores[[place[int(identifier)] for identifier in found]]
        # float32 products differ from float64 by up to a few 1e-7: order may differ only within that.
        np.testing.assert_allclose(found_scores, np.sort(scores)[::-1][: len(found)], atol=2e-6)
        np.testing.assert_allclose(hits.scores[row][: len(found)], found_scores, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_exact_duplicates_are_all_found_in_the_order_of_their_ids(gallery: Gallery, way: str) -> None:
    query = next(v for v, i in zip(gallery.vectors, gallery.ids, strict=True) if i == gallery.ids.min())
    twins = set(gallery.ids[(gallery.vectors == query).all(axis=1)].tolist())
    assert len(twins) == 6
    hits = gallery.ways[way](query[None], len(twins))
    assert hits.ids[0].tolist() == sorted(twins)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("query", [np.full((1, 24), np.nan, np.float32), np.zeros((1, 5), np.float32)])
def test_queries_that_cannot_be_compared_are_refused(gallery: Gallery, way: str, query: ndarray) -> None:
    with pytest.raises(ValueError, match=r"NaN|length"):
        gallery.ways[way](query, 3)
