"""Many clients at once: batches form, queues stay bounded, and the event loop is never held up."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.decode import decode_image
from indexing.living.live_view import LiveView
from lookalike.errors import DecodeError
from lookalike.records import SearchParameters
from serving.engine import embedding, searches
from serving.engine.errors import (
    OverloadedError,
    PicturesUnavailableError,
    UnknownItemError,
    UnsearchableVectorError,
)
from serving.engine.queries import Answer, QueryPart, SearchQuery
from serving.engine.query_engine import QueryEngine
from tests.unit.serving.engine.colour_index import COLOURS, build_colours, engine_of
from tests.unit.serving.engine.fake_encoder import FakeEncoder, picture_of, unit

PARAMETERS = SearchParameters(k=3)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture
def slow_encoder() -> FakeEncoder:
    return FakeEncoder(seconds_per_batch=0.05)


@pytest.fixture
def engine(index: Path, slow_encoder: FakeEncoder) -> Iterator[QueryEngine]:
    engine = engine_of(index, slow_encoder, max_batch=16, max_waiting_pictures=64)
    yield engine
    engine.close()


def by_picture(number: int, **how: float) -> SearchQuery:
    return SearchQuery((QueryPart(picture=picture_of(COLOURS[number % len(COLOURS)])),), PARAMETERS, **how)


async def ask_often(engine: QueryEngine, num_clients: int) -> tuple[list[Answer], list[OverloadedError], list[float]]:
    """One request of each client, all at once; the seconds are those of requests that were answered."""
    seconds: list[float] = []

    async def ask(number: int) -> Answer:
        started = time.perf_counter()
        answer = await engine.search(by_picture(number))
        assert answer.hits[0].item.id == number % len(COLOURS)
        seconds.append(time.perf_counter() - started)
        return answer

    outcomes = await asyncio.gather(*[ask(number) for number in range(num_clients)], return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, Answer | OverloadedError), outcome
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    return answers, [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)], seconds


def test_of_200_clients_as_many_are_let_in_as_there_is_room_for_and_these_are_answered_in_time(
    engine: QueryEngine, slow_encoder: FakeEncoder
) -> None:
    answers, refusals, seconds = asyncio.run(ask_often(engine, 200))
    assert len(answers) == 64
    assert len(refusals) == 136
    # One picture alone, then full batches, of 50 ms each: five or six. Ten times that is allowed for a busy machine.
    assert len(slow_encoder.batch_sizes) <= 8
    assert max(slow_encoder.batch_sizes) == 16
    assert max(seconds) < 10 * 6 * slow_encoder.seconds_per_batch


def test_who_is_not_let_in_is_told_at_once_and_when_to_come_back(engine: QueryEngine) -> None:
    async def ask() -> None:
        await ask_often(engine, 32)  # the rate is measured
        inside = [asyncio.create_task(engine.search(by_picture(number))) for number in range(64)]
        await asyncio.sleep(0)
        started = time.perf_counter()
        with pytest.raises(OverloadedError) as refusal:
            await engine.search(by_picture(0))
        assert time.perf_counter() - started < 0.04  # not even one batch has been waited for
        assert 0.04 < refusal.value.retry_after_seconds < 10  # 64 pictures at some 3 ms each, on a quiet machine
        await asyncio.gather(*inside)
        assert (await engine.search(by_picture(5))).hits[0].item.id == 5

    asyncio.run(ask())


def test_a_deadline_that_cannot_be_kept_is_refused_before_anything_is_done(
    engine: QueryEngine, slow_encoder: FakeEncoder
) -> None:
    async def ask() -> None:
        await ask_often(engine, 32)
        inside = [asyncio.create_task(engine.search(by_picture(number))) for number in range(48)]
        await asyncio.sleep(0)
        num_embedded = sum(slow_encoder.batch_sizes)
        with pytest.raises(OverloadedError):
            await engine.search(by_picture(0, deadline_seconds=0.005))
        await asyncio.gather(*inside)
        assert sum(slow_encoder.batch_sizes) == num_embedded + 48

    asyncio.run(ask())


def test_the_event_loop_is_never_held_up(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage takes 0.3 s, and half of that is how long the loop may be late: the machine has other work, too."""
    seconds = 0.3
    engine = engine_of(index, FakeEncoder(seconds_per_batch=seconds))

    def slowly(work: Callable[..., Any]) -> Callable[..., Any]:
        def slow_work(*arguments: Any, **how: Any) -> Any:
            time.sleep(seconds)
            return work(*arguments, **how)

        return slow_work

    monkeypatch.setattr(embedding, "decoded", slowly(embedding.decoded))
    monkeypatch.setattr(LiveView, "search", slowly(LiveView.search))
    monkeypatch.setattr(LiveView, "metadata_of", slowly(LiveView.metadata_of))

    async def longest_lag() -> float:
        async def ask_everything() -> None:
            await engine.search(by_picture(3))
            await engine.item(4)
            await engine.random_items(3, seed=0)
            await engine.items(limit=2)

        longest, clients = 0.0, asyncio.gather(*[ask_everything() for _ in range(4)])
        while not clients.done():
            due = time.perf_counter() + 0.005
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - due)
        await clients
        return longest

    lags = []
    while len(lags) < 3 and (not lags or lags[-1] >= seconds / 2):
        lags.append(asyncio.run(longest_lag()))
    engine.close()
    assert lags[-1] < seconds / 2, f"the event loop was held up each time: {lags} s"


def test_decoding_leaves_the_event_loop_its_turns(engine: QueryEngine) -> None:
    large = picture_of((128, 0, 255), side=3000, file_format="JPEG")
    started = time.perf_counter()
    decode_image(large)
    seconds_to_decode = time.perf_counter() - started

    async def share_of_time_held_up() -> float:
        clients = asyncio.gather(*[engine.search(SearchQuery((QueryPart(picture=large),))) for _ in range(6)])
        started, lags = time.perf_counter(), []
        while not clients.done():
            due = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            lags.append(time.perf_counter() - due)
        await clients
        assert time.perf_counter() - started > seconds_to_decode / 2
        return float(np.median(lags)) / seconds_to_decode

    # Were it done on the loop, or with the interpreter's lock held, half of the turns would wait for a whole picture.
    shares = [asyncio.run(share_of_time_held_up()) for _ in range(3)]
    assert min(shares) < 0.5, shares


def test_encoding_and_searching_take_place_beside_the_event_loop(
    engine: QueryEngine, slow_encoder: FakeEncoder
) -> None:
    asyncio.run(ask_often(engine, 4))
    assert {thread.name for thread in slow_encoder.threads} == {"encode-0"}


def test_exact_searches_of_many_clients_are_done_together_and_give_what_each_gives_alone(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(index, FakeEncoder())
    sizes: list[int] = []
    together = searches.search_together
    batcher = engine._searches._exact

    def slow_search(jobs: list) -> list:
        sizes.append(len(jobs))
        time.sleep(0.02)
        return together(jobs)

    monkeypatch.setattr(batcher, "_work", slow_search)
    queries = [SearchQuery((QueryPart(id=number),), SearchParameters(k=1 + number % 4)) for number in range(13)]
    queries += [SearchQuery((QueryPart(vector=unit(COLOURS[n])),), SearchParameters(k=2)) for n in range(13)]

    async def ask() -> list[Answer]:
        return await asyncio.gather(*[engine.search(query) for query in queries])

    answers = asyncio.run(ask())
    assert max(sizes) > 10  # whatever their k, and whichever ids are left out
    alone = [asyncio.run(engine.search(query)) for query in queries]
    for query, answer, expected in zip(queries, answers, alone, strict=True):
        assert len(answer.hits) == query.parameters.k
        assert [(hit.item.id, hit.score) for hit in answer.hits] == [(hit.item.id, hit.score) for hit in expected.hits]
        assert query.parts[0].id not in [hit.item.id for hit in answer.hits]
    engine.close()


def held_back(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> threading.Event:
    """Lets nobody through `owner.name` until the event is set."""
    is_let_go, function = threading.Event(), getattr(owner, name)

    def waiting(*arguments: Any) -> Any:
        is_let_go.wait(30)
        return function(*arguments)

    monkeypatch.setattr(owner, name, waiting)
    return is_let_go


def test_embedded_pictures_count_as_searches_and_are_never_turned_away(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(index, FakeEncoder(), max_waiting_searches=2)
    is_let_go = held_back(monkeypatch, LiveView, "search")

    async def ask() -> None:
        pictures = [asyncio.create_task(engine.search(by_picture(number))) for number in range(5)]
        while engine._searches._admission.num_inside < 5:
            await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="5 searches"):
            await engine.search(SearchQuery((QueryPart(id=3),), PARAMETERS))
        is_let_go.set()
        assert [answer.hits[0].item.id for answer in await asyncio.gather(*pictures)] == list(range(5))
        await engine.search(SearchQuery((QueryPart(id=3),), PARAMETERS))

    asyncio.run(asyncio.wait_for(ask(), 60))
    engine.close()


def test_lists_and_pictures_are_bounded_too(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(index, FakeEncoder(), max_waiting_reads=4)
    is_let_go = held_back(monkeypatch, LiveView, "metadata_of")

    async def ask() -> None:
        reads: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: engine.item(3),
            lambda: engine.items(limit=2),
            lambda: engine.random_items(2, seed=0),
            lambda: engine.original(3),
            lambda: engine.thumbnail(3, side=32),
            lambda: engine.versions(),
        ]
        inside = [asyncio.create_task(read()) for read in reads[:4]]
        await asyncio.sleep(0)
        for read in reads:
            with pytest.raises(OverloadedError, match="4 lists and pictures") as refusal:
                await read()
            assert refusal.value.retry_after_seconds > 0
        is_let_go.set()
        item, two, random, original = await asyncio.gather(*inside, return_exceptions=True)
        assert (item.id, len(two), len(random)) == (3, 2, 2)
        assert isinstance(original, PicturesUnavailableError)

    asyncio.run(asyncio.wait_for(ask(), 60))
    engine.close()


def test_changes_are_bounded_too_and_searches_do_not_wait_for_them(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(index, FakeEncoder(), max_waiting_writes=2)
    is_let_go = held_back(monkeypatch, engine._served_index.live.journal, "writing")
    changes: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: engine.add(vector=unit(COLOURS[0]), id=500),
        lambda: engine.delete(3),
        lambda: engine.replace(4, vector=unit(COLOURS[0])),
    ]

    async def ask() -> None:
        inside = [asyncio.create_task(change()) for change in changes[:2]]
        await asyncio.sleep(0)
        for change in changes:
            with pytest.raises(OverloadedError, match="2 changes") as refusal:
                await change()
            assert refusal.value.retry_after_seconds > 0
        assert (await engine.search(by_picture(3))).hits[0].item.id == 3
        is_let_go.set()
        await asyncio.gather(*inside)
        assert (await changes[2]()).id == 4

    asyncio.run(asyncio.wait_for(ask(), 60))
    assert engine.num_changes == 3
    engine.close()


def test_a_batch_of_queries_gives_an_answer_or_an_error_to_each(engine: QueryEngine) -> None:
    queries = [
        by_picture(3),
        SearchQuery((QueryPart(id=999),), PARAMETERS),
        SearchQuery((QueryPart(picture=b"no picture"),), PARAMETERS),
        SearchQuery((QueryPart(vector=[1.0, 2.0]),), PARAMETERS),
        SearchQuery((QueryPart(vector=np.zeros(4)),), PARAMETERS),
        SearchQuery((QueryPart(id=4),), PARAMETERS),
    ]
    outcomes = asyncio.run(engine.search_all(queries))
    kinds = (Answer, UnknownItemError, DecodeError, UnsearchableVectorError, UnsearchableVectorError, Answer)
    assert [type(outcome) for outcome in outcomes] == list(kinds)
