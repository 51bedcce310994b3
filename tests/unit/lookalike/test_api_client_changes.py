"""Both clients change a real server's gallery, search it by everything there is, and list it."""

import asyncio
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from lookalike.api_client import ApiClient, ApiProblem, AsyncApiClient, QueryPart, SearchQuery
from serving.app import create_app
from serving.engine.query_engine import QueryEngine
from serving.settings import ServingSettings
from tests.unit.serving.small_index import SmallIndex, draw, make_small_index

Question = Callable[[Any], Any]
both = pytest.mark.parametrize("kind", [ApiClient, AsyncApiClient])


@pytest.fixture(scope="module")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return make_small_index(tmp_path_factory.mktemp("small_index"))


@pytest.fixture(scope="module")
def server_url(small_index: SmallIndex) -> Iterator[str]:
    """A real server on a real socket, whose gallery may be changed."""
    engine = QueryEngine.open(small_index.index)
    app = create_app(engine, ServingSettings(index=small_index.index, allows_writes=True))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture
def asked(kind: type, server_url: str) -> Callable[[Question], Any]:
    def ask(question: Question) -> Any:
        if kind is ApiClient:
            with ApiClient(server_url) as client:
                return question(client)

        async def ask_async() -> Any:
            async with AsyncApiClient(server_url) as client:
                return await question(client)

        return asyncio.run(ask_async())

    return ask


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    draw("disc", colour).save(file, format="PNG")
    return file.getvalue()


@both
def test_pictures_are_added_replaced_and_deleted(asked: Callable[[Question], Any]) -> None:
    added = asked(lambda client: client.add(picture("navy"), metadata={"class_name": "disc", "key": "navy"}))
    assert (added.key, added.class_name, added.width) == ("navy", "disc", 96)
    assert asked(lambda client: client.search(picture("navy"), k=1)).hits[0].id == added.id
    assert asked(lambda client: client.item_image(added.id)) == picture("navy")
    assert asked(lambda client: client.item_image(added.id, "thumbnail")).startswith(b"\xff\xd8")
    with pytest.raises(ApiProblem) as refusal:
        asked(lambda client: client.add(picture("lime"), id=added.id))
    assert (refusal.value.status, refusal.value.code) == (409, "item.exists")
    replaced = asked(lambda client: client.add(picture("lime"), id=added.id, replace=True, metadata={"key": "lime"}))
    assert (replaced.id, replaced.key, replaced.class_name) == (added.id, "lime", None)
    again = asked(lambda client: client.replace(added.id, picture("brown")))
    assert again.key == "lime"
    assert asked(lambda client: client.search(picture("brown"), k=1)).hits[0].id == added.id
    vector = np.random.default_rng(1).normal(size=512).astype(np.float32)
    of_vector = asked(lambda client: client.add(vector=vector))
    assert of_vector.image_url is None
    assert asked(lambda client: client.replace(of_vector.id, vector=-vector)).id == of_vector.id
    assert asked(lambda client: client.search(vector=-vector, k=1)).hits[0].id == of_vector.id
    for id in (added.id, of_vector.id):
        assert asked(lambda client, id=id: client.delete(id)) is None
    with pytest.raises(ApiProblem, match=r"item\.unknown"):
        asked(lambda client: client.delete(added.id))


@both
def test_what_cannot_be_meant_is_not_sent(asked: Callable[[Question], Any]) -> None:
    for question, error in (
        (lambda client: client.add(), "exactly one of image and vector; found none"),
        (lambda client: client.add(b"a", vector=[1.0]), "found both"),
        (lambda client: client.add(b"a", replace=True), "replace has a meaning only with id"),
        (lambda client: client.search(parts=[QueryPart(id=1)], id=1), "found id and parts"),
    ):
        with pytest.raises(ValueError, match=error):
            asked(question)
    with pytest.raises(ValueError, match="exactly one of image, url, id and vector; found none"):
        QueryPart()


@both
def test_parts_and_batches_are_searched(asked: Callable[[Question], Any], small_index: SmallIndex) -> None:
    photo = (small_index.pictures / "ring" / "teal.png").read_bytes()
    vector = np.random.default_rng(2).normal(size=512).astype(np.float32)
    parts = [
        QueryPart(image=photo, roi=(4, 4, 80, 80)),
        QueryPart(image=photo, weight=0.5),
        QueryPart(id=3, weight=-0.5),
        QueryPart(vector=vector, weight=0.1),
    ]
    found = asked(lambda client: client.search(parts=parts, k=6, include=("vector", "metadata"), include_self=True))
    assert found.timings_ms == {}
    assert all(hit.vector is not None and hit.vector.shape == (512,) for hit in found.hits)
    assert all(hit.key is not None for hit in found.hits)
    queries = [SearchQuery(parts=parts, k=6, include_self=True), SearchQuery(id=99), SearchQuery(image=photo, k=2)]
    first, second, third = asked(lambda client: client.search_batch(queries))
    assert [hit.id for hit in first.hits] == [hit.id for hit in found.hits]
    assert isinstance(second, ApiProblem)
    assert second.code == "item.unknown"
    alone = asked(lambda client: client.search(photo, k=2))
    # Pictures that go through the encoder together differ in the last bit from one that goes alone.
    assert [hit.score for hit in third.hits] == pytest.approx([hit.score for hit in alone.hits], abs=1e-5)


@both
def test_pages_hold_everything_that_fits(asked: Callable[[Question], Any]) -> None:
    condition = {"column": "class_name", "in": ["ring", "disc"]}
    listed, after = [], None
    while True:
        page = asked(lambda client, after=after: client.items(after_id=after, limit=5, filter=condition))
        listed += page.items
        after = page.next_after_id
        if after is None:
            break
    assert len(listed) == 12
    assert {item.class_name for item in listed} == {"ring", "disc"}
    assert [item.id for item in listed] == sorted({item.id for item in listed})


@both
def test_versions_are_changed_over_to(asked: Callable[[Question], Any]) -> None:
    before = asked(lambda client: client.versions())
    assert before.current == before.served
    assert asked(lambda client: client.swap(before.current)) == before.current
    added = asked(lambda client: client.add(picture("navy")))
    compacted = asked(lambda client: client.compact())
    after = asked(lambda client: client.versions())
    assert (after.current, after.num_changes) == (compacted, 0)
    earlier = after.versions[-2].version
    assert asked(lambda client: client.rollback()) == earlier
    assert asked(lambda client: client.info()).index_version == earlier
    for version in (compacted, earlier):
        alone = asked(lambda client, version=version: client.search(picture("navy"), k=2, version=version))
        queries = [SearchQuery(id=added.id, include_self=True, version=version), SearchQuery(id=1, version="v9999")]
        by_id, unknown = asked(lambda client, queries=queries: client.search_batch(queries))
        assert [alone.index_version, by_id.index_version, unknown.code] == [version, version, "version.unknown"]
        assert all(added.id in [hit.id for hit in answer.hits[:2]] for answer in (alone, by_id))
    assert asked(lambda client: client.item(added.id)) == added
    with pytest.raises(ApiProblem) as refusal:
        asked(lambda client: client.swap("v9999"))
    assert refusal.value.code == "version.unknown"


def test_a_key_goes_with_every_request(tmp_path: Path) -> None:
    import httpx2

    seen: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get("authorization"))
        return httpx2.Response(204)

    for key, expected in (("secret", "Bearer secret"), (None, None)):
        with ApiClient("http://pictures.example", api_key=key, transport=httpx2.MockTransport(answer)) as client:
            client.delete(1)
        assert seen.pop() == expected
