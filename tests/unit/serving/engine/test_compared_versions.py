"""Searches that name a version: answered as if it had been swapped to, while another one serves."""

import asyncio
import gc
import io
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.shard_set import ShardSet
from indexing import versions
from indexing.building.build import build_index
from indexing.embed import embed_shards
from indexing.embedding_set import EmbeddingSet
from indexing.living.live_index import LiveIndex
from indexing.living.live_view import LiveView
from indexing.published_index import PublishedIndex
from indexing.reranking.settings import parse_rerank
from indexing.sources.embeddings import EmbeddingSource
from lookalike.encoder import create_encoder
from lookalike.encoder_settings import EncoderSettings, InputSettings
from lookalike.filters import parse_filter
from lookalike.records import SearchParameters
from serving.engine import compared_versions
from serving.engine.errors import (
    ComparisonOffError,
    OverloadedError,
    UnknownVersionError,
    UnsearchableVectorError,
    VersionRefusedError,
)
from serving.engine.queries import Answer, QueryPart, SearchQuery
from serving.engine.query_engine import QueryEngine
from tests.unit.serving.engine.colour_index import COLOURS, ServedColours, build_colours, engine_of
from tests.unit.serving.engine.fake_encoder import FakeEncoder, unit
from tests.unit.serving.small_index import SmallIndex, draw

OLIVE = unit((120, 120, 10))


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """v0001 to v0004, of which the last serves."""
    for index_type in ("Flat", "IVF2,Flat", "HNSW8", "Flat"):
        index = build_colours(tmp_path, index_type=index_type)
    return index


@pytest.fixture
def engine(colours: Path) -> Iterator[QueryEngine]:
    engine = engine_of(colours, FakeEncoder())
    yield engine
    engine.close()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the versions that are opened."""
    names: list[str] = []
    open_version = LiveIndex.open_version

    def open_recorded(self: LiveIndex, version: str) -> LiveView:
        names.append(version)
        return open_version(self, version)

    monkeypatch.setattr(LiveIndex, "open_version", open_recorded)
    return names


def by_vector(version: str | None, vector: Any = OLIVE, *, k: int = 30, **more: Any) -> SearchQuery:
    return SearchQuery((QueryPart(vector=vector),), SearchParameters(k=k), version=version, **more)


def ask(engine: QueryEngine, version: str | None, **more: Any) -> Answer:
    return asyncio.run(engine.search(by_vector(version, **more)))


def ids_of(answer: Answer) -> list[int]:
    return [hit.item.id for hit in answer.hits]


def found(answer: Answer) -> list[tuple[int, float, Any]]:
    return [(hit.item.id, hit.score, hit.item) for hit in answer.hits]


@pytest.mark.parametrize("method", [None, "alpha_query_expansion"])
def test_each_version_answers_as_after_a_swap_to_it(engine: QueryEngine, method: str | None) -> None:
    more = {"k": 9, "includes_vectors": True, "rerank": None if method is None else parse_rerank(method)}
    asyncio.run(engine.add(vector=OLIVE, id=500))
    asyncio.run(engine.delete(3))
    names = ["v0001", "v0002", "v0003", "v0004"]
    compared = {name: ask(engine, name, **more) for name in names}
    assert engine.served().index_version == versions.current_version(engine.index.folder.parent) == "v0004"
    for name in names:
        asyncio.run(engine.swap(name))
        swapped = ask(engine, None, **more)
        assert (compared[name].index_version, found(compared[name])) == (name, found(swapped))
        np.testing.assert_array_equal([hit.vector for hit in compared[name].hits], [hit.vector for hit in swapped.hits])


def test_changes_are_in_every_version_that_is_open(engine: QueryEngine, opened: list[str]) -> None:
    names = [None, "v0001", "v0003"]
    for name in names:
        assert len(ids_of(ask(engine, name))) == len(COLOURS)
    asyncio.run(engine.add(vector=OLIVE, id=500))
    for name in names:
        assert ids_of(ask(engine, name))[0] == 500
    # By another process, too.
    other = LiveIndex.open(engine.index.folder.parent)
    other.add(OLIVE[None], ids=[501])
    other.close()
    for name in names:
        assert ids_of(ask(engine, name))[:2] == [500, 501]
    asyncio.run(engine.replace(500, vector=-OLIVE))
    asyncio.run(engine.delete(501))
    asyncio.run(engine.delete(7))
    for name in names:
        ids = ids_of(ask(engine, name))
        assert (ids[-1], {7, 501} & set(ids), len(ids)) == (500, set(), len(COLOURS))
    assert opened == ["v0001", "v0003"]


def test_the_one_that_serves_is_not_opened_again(engine: QueryEngine, opened: list[str]) -> None:
    answer = ask(engine, "v0004")
    assert (answer.index_version, found(answer)) == ("v0004", found(ask(engine, None)))
    assert "open" not in answer.timings_ms
    assert not opened


def test_those_who_ask_at_once_open_it_once_and_may_leave(engine: QueryEngine, opened: list[str]) -> None:
    async def run() -> list[Any]:
        tasks = [asyncio.create_task(engine.search(by_vector("v0002"))) for _ in range(20)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(run())
    assert isinstance(first, asyncio.CancelledError)
    assert {answer.index_version for answer in others} == {"v0002"}
    assert all(answer.timings_ms["open"] > 0 for answer in others)
    assert opened == ["v0002"]


def test_a_change_made_while_a_version_is_opened_is_in_the_answer(
    engine: QueryEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read, may_go_on = threading.Event(), threading.Event()
    open_version = LiveIndex.open_version

    def open_slowly(self: LiveIndex, version: str) -> LiveView:
        view = open_version(self, version)
        is_read.set()
        assert may_go_on.wait(10)
        return view

    monkeypatch.setattr(LiveIndex, "open_version", open_slowly)

    async def run() -> Answer:
        first = asyncio.create_task(engine.search(by_vector("v0001")))
        await asyncio.to_thread(is_read.wait)
        await engine.add(vector=OLIVE, id=500)
        second = asyncio.create_task(engine.search(by_vector("v0001")))
        await asyncio.sleep(0)
        # Meanwhile, what serves goes on.
        assert ids_of(await engine.search(by_vector(None)))[0] == 500
        may_go_on.set()
        await first
        return await second

    assert ids_of(asyncio.run(run()))[0] == 500


@pytest.fixture
def may_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, v0001 cannot be opened."""
    event = threading.Event()
    open_now = LiveIndex._open

    def open_when_told(self: LiveIndex, version: str) -> LiveView:
        assert version != "v0001" or event.wait(20)
        return open_now(self, version)

    monkeypatch.setattr(LiveIndex, "_open", open_when_told)
    yield event
    event.set()


def test_few_wait_for_an_opening_and_none_beyond_the_deadline(
    colours: Path, opened: list[str], may_open: threading.Event
) -> None:
    engine = engine_of(colours, FakeEncoder(), max_waiting_searches=3, max_wait_seconds=0.3)

    async def seconds_until_refused() -> float:
        started = time.perf_counter()
        with pytest.raises(OverloadedError) as refusal:
            await engine.search(by_vector("v0001"))
        assert 0 < refusal.value.retry_after_seconds <= 10
        return time.perf_counter() - started

    async def run() -> Answer:
        seconds = sorted(await asyncio.gather(*[seconds_until_refused() for _ in range(20)]))
        assert seconds[16] < 0.3 <= seconds[17]
        assert seconds[19] < 10
        # What serves does not wait, and the opening went on for the next one who asks.
        assert (await engine.search(by_vector(None))).index_version == "v0004"
        may_open.set()
        while True:
            try:
                return await engine.search(by_vector("v0001"))
            except OverloadedError:
                continue

    assert asyncio.run(run()).index_version == "v0001"
    assert opened == ["v0001"]
    engine.close()


def test_no_swap_waits_for_an_opening(engine: QueryEngine, may_open: threading.Event) -> None:
    async def run() -> Answer:
        compared = asyncio.create_task(engine.search(by_vector("v0001")))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(engine.swap("v0002"), 10) == "v0002"
        assert not compared.done()
        may_open.set()
        return await compared

    assert asyncio.run(run()).index_version == "v0001"


def test_two_versions_that_are_opened_at_once_share_one_encoder(colours: Path) -> None:
    both_loaded = threading.Barrier(2, timeout=20)

    class Colours(ServedColours):
        def _check_canaries(self, *of_version: Any) -> int:
            if hasattr(self, "live"):
                both_loaded.wait()
            return super()._check_canaries(*of_version)

    index = Colours(colours, FakeEncoder())
    index._companions.clear()
    index._load_encoder = lambda base: FakeEncoder()
    with ThreadPoolExecutor(2) as threads:
        views = list(threads.map(index.live.open_version, ["v0001", "v0002"]))
    first, second = (index.serving(view).encoder for view in views)
    assert first is second is not None
    index.close()


def test_what_was_written_is_read_beside_the_event_loop(engine: QueryEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by: list[threading.Thread] = []
    brought_up_to_date = LiveIndex.brought_up_to_date

    def recorded(self: LiveIndex, view: LiveView) -> LiveView:
        read_by.append(threading.current_thread())
        return brought_up_to_date(self, view)

    monkeypatch.setattr(LiveIndex, "brought_up_to_date", recorded)
    ask(engine, "v0001")
    asyncio.run(engine.add(vector=OLIVE, id=500))
    for _ in range(3):
        assert ids_of(ask(engine, "v0001"))[0] == 500
    [thread] = read_by
    assert thread is not threading.main_thread()


def test_few_stay_open_and_what_is_let_go_of_leaves_memory(engine: QueryEngine, opened: list[str]) -> None:
    bases: dict[str, weakref.ref[PublishedIndex]] = {}

    def open_bases() -> set[str]:
        gc.collect()
        return {name for name, base in bases.items() if base() is not None}

    def use(name: str) -> None:
        ask(engine, name)
        bases[name] = weakref.ref(engine._compared._open[name].view().base)

    for name in ("v0001", "v0002", "v0001"):
        use(name)
    assert (open_bases(), opened) == ({"v0001", "v0002"}, ["v0001", "v0002"])
    use("v0003")
    assert open_bases() == {"v0001", "v0003"}
    # What serves from now on is open once.
    asyncio.run(engine.swap("v0003"))
    ask(engine, None)
    assert open_bases() == {"v0001"}
    shutil.rmtree(engine.index.folder.parent / "v0001")
    engine.served()
    assert open_bases() == set()
    with pytest.raises(UnknownVersionError, match=r"no version v0001; there are v0002, v0003, v0004"):
        ask(engine, "v0001")
    use("v0004")
    engine.close()
    assert open_bases() == set()


def test_a_version_that_cannot_be_opened_is_refused_and_not_tried_each_time(
    engine: QueryEngine, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine.index.folder.parent / "v0001" / "vectors.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])

    async def storm() -> list[Any]:
        queries = [by_vector("v0001"), by_vector(None)] * 30
        return await engine.search_all(queries)

    outcomes = asyncio.run(storm()) + asyncio.run(storm())
    for refusal, answer in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert isinstance(refusal, VersionRefusedError)
        assert "v0001" in str(refusal)
        assert answer.index_version == "v0004"
    assert len({id(refusal) for refusal in outcomes[::2]}) == 60
    assert opened == ["v0001"]
    path.write_bytes(whole)
    monkeypatch.setattr(compared_versions, "_SECONDS_BETWEEN_TRIES", -1.0)
    engine._compared._refusals["v0001"].holds_until = 0
    assert ask(engine, "v0001").index_version == "v0001"


def test_where_none_is_to_be_compared_only_the_one_that_serves_is_searched(colours: Path, opened: list[str]) -> None:
    engine = engine_of(colours, FakeEncoder(), max_compared_versions=0)
    assert ask(engine, "v0004").index_version == "v0004"
    with pytest.raises(ComparisonOffError, match=r"version v0004, which serves, and no other"):
        ask(engine, "v0001")
    assert not opened
    engine.close()


def test_searches_of_versions_never_fail_while_they_come_and_go(engine: QueryEngine) -> None:
    async def run() -> list[int]:
        is_over = asyncio.Event()

        async def search(name: str | None) -> int:
            num_searches = 0
            while not is_over.is_set():
                answer = await engine.search(by_vector(name, unit(COLOURS[num_searches % 26]), k=5))
                assert answer.hits[0].score > 0.99
                assert name is None or answer.index_version == name
                num_searches += 1
            return num_searches

        async def change() -> None:
            for name in ("v0002", "v0001", "v0003", "v0002"):
                added = await engine.add(vector=OLIVE)
                await engine.swap(name)
                await engine.delete(added.id)
            is_over.set()

        searches = [asyncio.create_task(search(name)) for name in (None, "v0001", "v0002", "v0003")]
        await change()
        return await asyncio.gather(*searches)

    assert min(asyncio.run(run())) > 3


class TestRealEncoders:
    """v0001 is as it was built; v0002 holds the same pictures by another encoder, and serves."""

    @pytest.fixture(scope="class")
    @staticmethod
    def by_two_encoders(small_index: SmallIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("by_two_encoders")
        shutil.copytree(small_index.index, folder / "index")
        torch.manual_seed(1)
        encoder = create_encoder(EncoderSettings(backbone="resnet10t", input=InputSettings(size=64), projection_dim=32))
        with ShardSet.open(small_index.shards) as shards:
            embeddings = embed_shards(encoder, shards, folder / "embeddings")
        build_index(EmbeddingSource(embeddings), folder / "index")
        return folder / "index"

    @pytest.fixture
    def index(self, by_two_encoders: Path, tmp_path: Path) -> Path:
        shutil.copytree(by_two_encoders, tmp_path / "index")
        return tmp_path / "index"

    @pytest.fixture
    def engine(self, index: Path, small_index: SmallIndex) -> Iterator[QueryEngine]:
        engine = QueryEngine.open(index, shards_folder=small_index.shards)
        yield engine
        engine.close()

    def test_a_picture_goes_through_the_encoder_of_the_version(
        self, engine: QueryEngine, small_index: SmallIndex
    ) -> None:
        picture = (small_index.pictures / "ring" / "teal.png").read_bytes()

        def query(version: str | None) -> SearchQuery:
            return SearchQuery((QueryPart(picture=picture),), SearchParameters(k=30), version=version)

        async def both() -> list[Any]:
            return await engine.search_all([query(None), query("v0001"), query("v0002")])

        serving, older, newer = asyncio.run(both())
        assert [older.index_version, newer.index_version] == ["v0001", "v0002"]
        assert older.encoder_fingerprint != newer.encoder_fingerprint
        for answer in (serving, older, newer):
            assert answer.hits[0].score == pytest.approx(1, abs=1e-4)
            assert answer.hits[0].item.key == "ring/teal"
        # One shard set shows the pictures of both.
        assert {hit.item.picture for hit in older.hits} == {hit.item.picture for hit in newer.hits}
        asyncio.run(engine.swap("v0001"))
        swapped = asyncio.run(engine.search(query(None)))
        assert ids_of(swapped) == ids_of(older) != ids_of(newer)
        np.testing.assert_allclose([h.score for h in swapped.hits], [h.score for h in older.hits], atol=1e-5)

    def test_vectors_are_of_the_length_of_the_version(self, engine: QueryEngine) -> None:
        assert ask(engine, "v0001", vector=np.ones(512)).index_version == "v0001"
        with pytest.raises(UnsearchableVectorError):
            ask(engine, None, vector=np.ones(512))
        with pytest.raises(UnsearchableVectorError):
            ask(engine, "v0001", vector=np.ones(32))

    def test_what_no_longer_goes_with_the_journal_is_refused(self, engine: QueryEngine) -> None:
        vector = np.ones(512)
        assert len(ask(engine, "v0001", vector=vector).hits) == 24
        file = io.BytesIO()
        draw("disc", "navy").save(file, format="PNG")
        asyncio.run(engine.add(picture=file.getvalue()))
        for _ in range(2):
            with pytest.raises(VersionRefusedError, match=r"v0001 .* additions of length 32"):
                ask(engine, "v0001", vector=vector)
        assert not engine._compared._open

    @pytest.mark.parametrize("spoil", ["vectors", "encoder"])
    def test_canaries_tell_what_was_spoilt(self, engine: QueryEngine, index: Path, spoil: str) -> None:
        if spoil == "vectors":
            vectors = np.load(index / "v0001" / "vectors.npy")
            np.save(index / "v0001" / "vectors.npy", np.roll(vectors, 1, axis=0))
        else:
            shutil.rmtree(index / "v0001" / "encoder")
            shutil.copytree(index / "v0002" / "encoder", index / "v0001" / "encoder")
        with pytest.raises(VersionRefusedError, match="v0001"):
            ask(engine, "v0001", vector=np.ones(512))
        assert ask(engine, None, vector=np.ones(32)).index_version == "v0002"

    def test_an_encoder_leaves_memory_with_its_version_unless_it_serves(
        self, engine: QueryEngine, index: Path, small_index: SmallIndex
    ) -> None:
        build_index(EmbeddingSource(EmbeddingSet.open(small_index.index.parent / "embeddings")), index)
        versions.publish(index, "v0002")
        ask(engine, "v0001", vector=np.ones(512))
        ask(engine, "v0003", vector=np.ones(512))
        encoders = {name: one.view().base for name, one in engine._compared._open.items()}
        shared = {weakref.ref(engine._served_index._companions[base].encoder) for base in encoders.values()}
        assert len(shared) == 1
        del encoders
        asyncio.run(engine.swap("v0001"))
        ask(engine, "v0002", vector=np.ones(32))
        [encoder] = shared
        assert engine.served().encoder is encoder()
        asyncio.run(engine.swap("v0002"))
        for name in ("v0001", "v0003"):
            shutil.rmtree(index / name)
        engine.served()
        gc.collect()
        assert encoder() is None


def test_pictures_are_those_of_the_version_that_serves(small_index: SmallIndex, tmp_path: Path) -> None:
    """Ids 0 to 23 are the pictures of the shards; the later version gives 0 to another one, and lacks 23."""
    index = tmp_path / "index"
    shutil.copytree(small_index.index, index)
    engine = QueryEngine.open(index, shards_folder=small_index.shards)
    ring = (small_index.pictures / "ring" / "teal.png").read_bytes()
    asyncio.run(engine.replace(0, picture=ring, metadata={"key": "another"}))
    asyncio.run(engine.delete(23))
    query = SearchQuery((QueryPart(id=1),), SearchParameters(k=30), includes_query=True, version="v0001")
    assert asyncio.run(engine.compact()) == "v0002"
    as_one = {hit.item.id: hit.item for hit in asyncio.run(engine.search(query)).hits}
    now = {item.id: item for item in asyncio.run(engine.items(limit=30))}
    # Changes are in force whichever version is asked, so the same is shown.
    assert {id: item.picture for id, item in as_one.items()} == {id: item.picture for id, item in now.items()}
    assert as_one[0].key == "another"
    # As if somebody had built it of other files: then nothing of it is shown by the wrong picture.
    journal = index / "changes.sqlite"
    engine.close()
    for path in (journal, journal.with_name(f"{journal.name}-wal"), journal.with_name(f"{journal.name}-shm")):
        path.unlink(missing_ok=True)
    engine = QueryEngine.open(index, shards_folder=small_index.shards)
    older = {hit.item.id: hit.item for hit in asyncio.run(engine.search(query)).hits}
    assert (older[0].key != "another", older[0].picture, older[23].picture) == (True, None, None)
    tags = {item.picture for id, item in older.items() if id not in (0, 23)}
    assert tags == {engine.served().shards.fingerprint[:12]}  # type: ignore[union-attr]
    none_fits = parse_filter({"column": "key", "equals": "neither"})
    nothing = SearchQuery((QueryPart(id=1),), SearchParameters(filter=none_fits), version="v0001")
    assert asyncio.run(engine.search(nothing)).hits == []
    engine.close()
