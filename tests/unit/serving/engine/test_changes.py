"""Additions, replacements and deletions through the engine, and the pictures that come with them."""

import asyncio
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import DecodeLimits
from indexing import versions
from indexing.living.journal import JournalTransaction
from indexing.living.live_index import LiveIndex
from lookalike.errors import DecodeError, ResourceError
from lookalike.filters import parse_filter
from lookalike.records import SearchParameters
from serving.engine.errors import (
    IdTakenError,
    PicturesUnavailableError,
    UnfitItemError,
    UnknownItemError,
    UnsearchableFilterError,
    UnsearchableVectorError,
)
from serving.engine.pictures import ThumbnailCache
from serving.engine.queries import QueryPart, SearchQuery
from serving.engine.query_engine import QueryEngine
from tests.unit.serving.engine.colour_index import COLOURS, ServedColours, build_colours, engine_of
from tests.unit.serving.engine.fake_encoder import FakeEncoder, picture_of, unit
from tests.unit.serving.small_index import NUM_PICTURES, SmallIndex, draw

OLIVE = (120, 120, 10)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[QueryEngine]:
    engine = engine_of(build_colours(tmp_path), FakeEncoder())
    yield engine
    engine.close()


@pytest.fixture
def real_engine(small_index: SmallIndex, tmp_path: Path) -> Iterator[QueryEngine]:
    """With the encoder and the shards of a real index, which may be changed."""
    shutil.copytree(small_index.index, tmp_path / "index")
    engine = QueryEngine.open(tmp_path / "index", shards_folder=small_index.shards)
    yield engine
    engine.close()


def nearest(engine: QueryEngine, colour: tuple[int, int, int], **how: object) -> list[int]:
    query = SearchQuery((QueryPart(picture=picture_of(colour)),), SearchParameters(k=3, **how))  # type: ignore[arg-type]
    return [hit.item.id for hit in asyncio.run(engine.search(query)).hits]


def test_an_added_picture_is_found_described_shown_and_there_after_a_restart(
    engine: QueryEngine, tmp_path: Path
) -> None:
    picture = picture_of(OLIVE, side=50)
    item = asyncio.run(engine.add(picture=picture, metadata={"red": 120}))
    assert (item.id, item.key, item.width, item.metadata) == (len(COLOURS), str(len(COLOURS)), 50, {"red": 120})
    assert item.picture is not None
    assert nearest(engine, OLIVE)[0] == item.id
    assert nearest(engine, OLIVE, filter=parse_filter({"column": "red", "equals": 120})) == [item.id]
    shown = asyncio.run(engine.original(item.id))
    assert (shown.data, shown.media_type) == (picture, "image/png")
    engine.close()
    again = engine_of(tmp_path / "index", FakeEncoder())
    assert nearest(again, OLIVE)[0] == item.id
    assert asyncio.run(again.item(item.id)) == item
    assert asyncio.run(again.original(item.id)) == shown
    again.close()


def test_a_vector_is_added_under_the_id_and_the_metadata_that_it_is_given(engine: QueryEngine) -> None:
    item = asyncio.run(engine.add(vector=7 * unit(OLIVE), metadata={"key": "olive"}, id=500))
    assert (item.id, item.key, item.picture) == (500, "olive", None)
    query = SearchQuery((QueryPart(vector=unit(OLIVE)),), SearchParameters(k=1), includes_vectors=True)
    [hit] = asyncio.run(engine.search(query)).hits
    assert hit.item == item
    np.testing.assert_allclose(hit.vector, unit(OLIVE), atol=1e-6)
    with pytest.raises(PicturesUnavailableError):
        asyncio.run(engine.original(500))


def test_what_cannot_be_held_is_refused_and_nothing_is_added(engine: QueryEngine) -> None:
    for error, how in (
        (IdTakenError, {"vector": unit(OLIVE), "id": 3}),
        (UnfitItemError, {"vector": unit(OLIVE), "id": -1}),
        (UnfitItemError, {"vector": unit(OLIVE), "metadata": {"colour": "olive"}}),
        (UnfitItemError, {"vector": unit(OLIVE), "metadata": {"red": "much"}}),
        (UnsearchableVectorError, {"vector": [1.0, 2.0]}),
        (DecodeError, {"picture": b"GIF89a"}),
        (ValueError, {"picture": picture_of(OLIVE), "vector": unit(OLIVE)}),
        (ValueError, {}),
    ):
        with pytest.raises(error):
            asyncio.run(engine.add(**how))  # type: ignore[arg-type]
    assert engine.served().view.num_vectors == len(COLOURS)
    assert engine.num_changes == 0


def test_a_replacement_keeps_the_metadata_unless_it_brings_its_own(engine: QueryEngine) -> None:
    kept = asyncio.run(engine.replace(3, picture=picture_of(OLIVE, side=20)))
    assert (kept.key, kept.metadata, kept.width) == ("-".join(map(str, COLOURS[3])), {"red": COLOURS[3][0]}, 20)
    assert nearest(engine, OLIVE)[0] == 3
    own = asyncio.run(engine.replace(3, vector=unit(COLOURS[3]), metadata={"red": 9}))
    assert own.metadata == {"red": 9}
    assert nearest(engine, COLOURS[3])[0] == 3
    assert own.picture is None  # that of the vector before
    with pytest.raises(UnknownItemError):
        asyncio.run(engine.replace(999, vector=unit(OLIVE)))


def test_a_replacement_keeps_the_metadata_that_another_process_gives_at_the_last_moment(
    engine: QueryEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = engine._served_index.live.journal
    writing = journal.writing

    def replaced_first() -> AbstractContextManager[JournalTransaction]:
        with closing(LiveIndex.open(journal.path.parent)) as other:
            other.replace([3], unit(OLIVE)[None], [{"key": "new", "red": 7, "width": 9}])
        return writing()

    monkeypatch.setattr(journal, "writing", replaced_first)
    kept = asyncio.run(engine.replace(3, vector=unit(COLOURS[3])))
    assert (kept.key, kept.metadata, kept.width) == ("new", {"red": 7}, 9)
    kept = asyncio.run(engine.replace(3, picture=picture_of(COLOURS[3], side=20)))
    assert (kept.key, kept.metadata, kept.width) == ("new", {"red": 7}, 20)
    monkeypatch.undo()
    assert asyncio.run(engine.item(3)) == kept


@pytest.mark.parametrize("replaces", [False, True])
def test_a_change_is_answered_as_it_was_made_though_another_process_deletes_it_at_once(
    engine: QueryEngine, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    journal = engine._served_index.live.journal
    writing = journal.writing
    changed = 3 if replaces else len(COLOURS)

    @contextmanager
    def deleted_at_once() -> Iterator[JournalTransaction]:
        with writing() as transaction:
            yield transaction
        with closing(LiveIndex.open(journal.path.parent)) as other:
            other.delete([changed])

    monkeypatch.setattr(journal, "writing", deleted_at_once)
    how: dict[str, Any] = {"picture": picture_of(OLIVE), "metadata": {"red": 120}}
    item = asyncio.run(engine.replace(3, **how) if replaces else engine.add(**how))
    assert (item.id, item.key, item.width, item.metadata) == (changed, str(changed), 16, {"red": 120})
    assert changed not in nearest(engine, OLIVE)
    with pytest.raises(UnknownItemError):
        asyncio.run(engine.item(changed))


def test_a_vector_of_another_encoder_than_the_current_version_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_colours(tmp_path)
    build_colours(tmp_path, index_type="IVF2,Flat")
    versions.publish(index, "v0001")
    engine = engine_of(index, FakeEncoder())
    served_index, journal = engine._served_index, engine._served_index.live.journal
    writing = journal.writing

    def published_first() -> AbstractContextManager[JournalTransaction]:
        """The last moment at which it can become current: nobody publishes within the transaction."""
        served_index._fake = FakeEncoder(fingerprint="other")  # type: ignore[attr-defined]
        versions.publish(index, "v0002")
        return writing()

    monkeypatch.setattr(journal, "writing", published_first)
    for change in (engine.add(picture=picture_of(OLIVE)), engine.replace(3, picture=picture_of(OLIVE))):
        with pytest.raises(ResourceError, match=r"v0002, of another encoder, has replaced v0001"):
            asyncio.run(change)
        versions.publish(index, "v0001")
        served_index._fake = FakeEncoder()  # type: ignore[attr-defined]
        served_index.live.refresh()
    assert engine.num_changes == 0
    monkeypatch.undo()
    assert asyncio.run(engine.add(picture=picture_of(OLIVE))).id == len(COLOURS)
    engine.close()


def test_what_is_deleted_is_gone_for_every_search_and_listing(engine: QueryEngine) -> None:
    asyncio.run(engine.delete(3))
    assert 3 not in nearest(engine, COLOURS[3])
    for gone in (engine.item(3), engine.original(3), engine.thumbnail(3, side=32), engine.delete(3)):
        with pytest.raises(UnknownItemError):
            asyncio.run(gone)
    with pytest.raises(UnknownItemError):
        asyncio.run(engine.search(SearchQuery((QueryPart(id=3),))))
    assert 3 not in [item.id for item in asyncio.run(engine.items(limit=100))]
    assert 3 not in [item.id for item in asyncio.run(engine.random_items(100, seed=1))]


def test_pages_of_items_are_those_of_a_slow_listing_whatever_has_changed(engine: QueryEngine) -> None:
    for number in (0, 5, 6, 7, 25):
        asyncio.run(engine.delete(number))
    asyncio.run(engine.replace(9, vector=unit(OLIVE), metadata={"red": 255}))
    for identifier in (5, 100, 90):
        asyncio.run(engine.add(vector=unit(OLIVE), metadata={"red": 255}, id=identifier))
    view = engine.served().view
    everything = view.ids()
    reds = np.array([row["red"] for row in view.metadata_of(everything)])
    for condition, ids in ((None, everything), ({"column": "red", "equals": 255}, everything[reds == 255])):
        chosen = None if condition is None else parse_filter(condition)
        for limit in (1, 3, 100):
            after, listed = -1, []
            while page := asyncio.run(engine.items(after_id=after, limit=limit, filter=chosen)):
                assert len(page) <= limit
                listed += [item.id for item in page]
                after = listed[-1]
            assert listed == ids.tolist()
    with pytest.raises(UnsearchableFilterError):
        asyncio.run(engine.items(limit=3, filter=parse_filter({"column": "price", "equals": 1})))
    picked = [item.id for item in asyncio.run(engine.random_items(8, seed=4))]
    assert len(set(picked)) == 8
    assert set(picked) <= set(everything.tolist())
    assert sorted(item.id for item in asyncio.run(engine.random_items(100, seed=4))) == everything.tolist()


def test_several_parts_are_the_sum_of_their_weighted_unit_vectors(engine: QueryEngine) -> None:
    parts = (
        QueryPart(id=4, weight=0.5),
        QueryPart(vector=9 * unit(OLIVE), weight=2.0),
        QueryPart(picture=picture_of(COLOURS[20]), weight=-1.0),
    )
    total = 0.5 * unit(COLOURS[4]).astype(np.float64) + 2 * unit(OLIVE) - unit(COLOURS[20])
    vectors = np.stack([unit(colour) for colour in COLOURS])
    scores = vectors @ (total / np.linalg.norm(total))
    expected = [int(i) for i in np.argsort(-scores) if i != 4]
    answer = asyncio.run(engine.search(SearchQuery(parts, SearchParameters(k=6))))
    assert [hit.item.id for hit in answer.hits] == expected[:6]
    np.testing.assert_allclose([hit.score for hit in answer.hits], scores[expected[:6]], atol=1e-6)
    with pytest.raises(UnsearchableVectorError) as refusal:
        asyncio.run(engine.search(SearchQuery((QueryPart(id=4), QueryPart(id=4, weight=-1.0)))))
    assert refusal.value.reason == "cancelled_out"


def test_pictures_of_a_real_index_come_from_the_shards_until_they_are_replaced(
    real_engine: QueryEngine, small_index: SmallIndex
) -> None:
    ring = (small_index.pictures / "ring" / "gold.jpg").read_bytes()
    item = asyncio.run(real_engine.search(SearchQuery((QueryPart(picture=ring),), SearchParameters(k=1)))).hits[0].item
    assert item.key == "ring/gold"
    assert asyncio.run(real_engine.original(item.id)).data == ring
    asyncio.run(real_engine.delete(item.id))
    # The number that the shards know another picture by: it must not be shown for this one.
    vector = np.ones(real_engine.index.dim)
    other = asyncio.run(real_engine.add(vector=vector, id=item.id, metadata={"key": "no ring"}))
    assert other.picture is None
    with pytest.raises(PicturesUnavailableError, match="no picture was stored"):
        asyncio.run(real_engine.original(item.id))
    disc = (small_index.pictures / "disc" / "gold.jpg").read_bytes()
    replaced = asyncio.run(real_engine.replace(item.id, picture=disc))
    assert replaced.picture is not None
    shown = asyncio.run(real_engine.original(item.id))
    assert (shown.data, shown.media_type) == (disc, "image/jpeg")
    # All of this is still so when a compaction has taken it in.
    real_engine._served_index.live.compact()
    assert asyncio.run(real_engine.original(item.id)) == shown
    assert asyncio.run(real_engine.item(item.id)) == replaced
    untouched = asyncio.run(real_engine.items(limit=NUM_PICTURES))
    assert all(item.picture is not None for item in untouched)


def test_an_added_picture_has_the_vector_that_embedding_the_gallery_gives_it(
    real_engine: QueryEngine, small_index: SmallIndex
) -> None:
    picture = (small_index.pictures / "ring" / "teal.png").read_bytes()
    added = asyncio.run(real_engine.add(picture=picture))
    query = SearchQuery((QueryPart(picture=picture),), SearchParameters(k=2))
    first, second = asyncio.run(real_engine.search(query)).hits
    assert {first.item.key, second.item.key} == {"ring/teal", str(added.id)}
    assert first.score == pytest.approx(second.score, abs=1e-6)
    assert (added.width, added.height) == (96, 96)


def test_thumbnails_fit_and_are_made_once(real_engine: QueryEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    draw("disc", "teal", side=600).resize((600, 300)).save(file, format="JPEG")
    added = asyncio.run(real_engine.add(picture=file.getvalue()))
    for identifier, side, size in ((added.id, 64, (64, 32)), (added.id, 1000, (600, 300)), (0, 32, (32, 32))):
        small = asyncio.run(real_engine.thumbnail(identifier, side=side))
        image = Image.open(io.BytesIO(small.data))
        assert (image.size, image.format, small.media_type) == (size, "JPEG", "image/jpeg")
    expected = Image.open(file).convert("RGB").resize((64, 32), Image.Resampling.LANCZOS)
    found = Image.open(io.BytesIO(asyncio.run(real_engine.thumbnail(added.id, side=64)).data)).convert("RGB")
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).mean() < 8  # JPEG twice
    monkeypatch.setattr("serving.engine.pictures.CroppablePicture", None)
    assert asyncio.run(real_engine.thumbnail(0, side=32)) == small


def test_the_limits_of_uploads_are_none_for_what_is_in_the_gallery(
    real_engine: QueryEngine, small_index: SmallIndex, tmp_path: Path
) -> None:
    strict = QueryEngine.open(
        tmp_path / "index", shards_folder=small_index.shards, picture_limits=DecodeLimits(max_pixels=500)
    )
    with pytest.raises(DecodeError):
        asyncio.run(strict.add(picture=picture_of(OLIVE, side=32)))
    assert Image.open(io.BytesIO(asyncio.run(strict.thumbnail(0, side=32)).data)).size == (32, 32)
    strict.close()


def test_a_picture_within_wide_limits_is_added_with_its_size(tmp_path: Path) -> None:
    wide = DecodeLimits(max_side=40_000)
    encoder = FakeEncoder()
    engine = QueryEngine(ServedColours(build_colours(tmp_path), encoder), picture_limits=wide)
    file = io.BytesIO()
    Image.new("RGB", (35_000, 2), OLIVE).save(file, format="PNG")
    item = asyncio.run(engine.add(picture=file.getvalue()))
    assert item.width == 35_000
    assert Image.open(io.BytesIO(asyncio.run(engine.thumbnail(item.id, side=64)).data)).width == 64
    engine.close()


def test_the_thumbnail_cache_never_holds_more_than_it_may_and_forgets_what_was_not_asked_for() -> None:
    cache = ThumbnailCache(100)
    for name in "abc":
        cache.put(name, b"x" * 40)
        cache.get("a")
    assert cache.num_bytes == 80
    assert [name for name in "abc" if cache.get(name)] == ["a", "c"]
    cache.put("huge", b"x" * 101)
    assert cache.num_bytes == 0
    cache.put("a", b"x" * 60)
    cache.put("a", b"x" * 70)
    assert cache.num_bytes == 70


_ADDER = """
import asyncio, sys
from tests.unit.serving.engine.colour_index import engine_of
from tests.unit.serving.engine.fake_encoder import FakeEncoder, picture_of
from pathlib import Path

async def add_without_end():
    engine = engine_of(Path(sys.argv[1]), FakeEncoder())
    while True:
        items = await asyncio.gather(*[engine.add(picture=picture_of((n, n, 9))) for n in range(8)])
        print(*[item.id for item in items], flush=True)

asyncio.run(add_without_end())
"""


def test_a_killed_process_loses_no_acknowledged_addition(tmp_path: Path) -> None:
    index = build_colours(tmp_path)
    command = [sys.executable, "-c", _ADDER, str(index)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        process.kill()
        lines += [line for line in process.stdout if line.endswith("\n")]
    acknowledged = [int(word) for line in lines for word in line.split()]
    assert len(acknowledged) >= 40
    live = LiveIndex.open(index)
    assert set(acknowledged) <= set(live.ids().tolist())
    assert set(acknowledged) == live.journal.with_pictures(acknowledged)
    live.close()
