"""What the engine promises beyond its answers, which test_api.py compares with brute force."""

import asyncio
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from PIL import Image, ImageCms

from data_pipelines.decode import decode_image
from data_pipelines.settings import ShardSettings
from data_pipelines.shard_set import ShardSet
from data_pipelines.shard_writer import write_shards
from data_pipelines.sources import SourcePicture, pixel_box
from indexing.embed import embed_shards
from indexing.published_index import PublishedIndex
from indexing.settings import EmbedSettings
from lookalike.errors import DecodeError
from lookalike.records import SearchParameters
from serving.engine.errors import UnsearchableRegionError
from serving.engine.query_engine import QueryEngine


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, threading.Thread]]:
    """Fills with what is used of an index, and on which thread."""
    uses: list[tuple[str, threading.Thread]] = []
    search, ids = PublishedIndex.search, PublishedIndex.ids

    def search_recorded(self: PublishedIndex, *arguments: Any) -> Any:
        uses.append(("search", threading.current_thread()))
        return search(self, *arguments)

    def ids_recorded(self: PublishedIndex) -> Any:
        uses.append(("ids", threading.current_thread()))
        return ids(self)

    monkeypatch.setattr(PublishedIndex, "search", search_recorded)
    monkeypatch.setattr(PublishedIndex, "ids", ids_recorded)
    return uses


def test_warming_up_searches_and_sorts_the_ids(engine: QueryEngine, used: list[tuple[str, threading.Thread]]) -> None:
    asyncio.run(engine.warm_up())
    assert {name for name, _ in used} == {"search", "ids"}
    assert threading.current_thread() not in {thread for _, thread in used}


def test_random_items_are_chosen_beside_the_event_loop(
    engine: QueryEngine, used: list[tuple[str, threading.Thread]]
) -> None:
    assert len(asyncio.run(engine.random_items(5, seed=0))) == 5
    assert used
    assert threading.current_thread() not in {thread for _, thread in used}


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A JPEG that a viewer turns upright and whose colours it corrects, with detail in every block."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    # Swaps red and green, and no longer calls itself sRGB, which would be left alone.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"****"), (b"gXYZ", b"rXYZ"), (b"****", b"gXYZ"), (b"s\0R\0G\0B", b"x\0R\0G\0B")):
        assert old in profile
        profile = profile.replace(old, new)
    file = io.BytesIO()
    image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    image.save(file, format="JPEG", quality=85, exif=exif, icc_profile=profile)
    upright = np.asarray(Image.open(file).convert("RGB").transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(upright - decode_image(file.getvalue())).mean() > 10  # The profile changes what is seen.
    return file.getvalue()


class TestRegions:
    # Some large enough for a decoder that shrinks on the way, some over the edges, some with halves.
    BOXES = (
        (0, 0, 480, 640),
        (16, 40, 400, 600),
        (100.5, 33.5, 250.5, 211.5),
        (7.49, 8.51, 40.2, 42.7),
        (-30.7, -1.2, 99, 101),
        (200, 300, 1e6, 1e6),
        (479, 639, 480, 640),
    )

    @pytest.fixture
    def searched(self, monkeypatch: pytest.MonkeyPatch) -> list[ndarray]:
        """Fills with the vectors that are searched with."""
        vectors: list[ndarray] = []
        search = PublishedIndex.search

        def search_recorded(self: PublishedIndex, vector: ndarray, *arguments: Any) -> Any:
            vectors.append(vector[0])
            return search(self, vector, *arguments)

        monkeypatch.setattr(PublishedIndex, "search", search_recorded)
        return vectors

    def test_a_region_gives_the_vector_of_a_shard_written_with_that_box(
        self, engine: QueryEngine, searched: list[ndarray], photo: bytes, tmp_path: Path
    ) -> None:
        path = tmp_path / "photo.jpg"
        path.write_bytes(photo)

        class Boxes:
            def pictures(self) -> Sequence[SourcePicture]:
                boxes = map(pixel_box, TestRegions.BOXES)
                return [SourcePicture(f"{row}", path, None, "query", box=box) for row, box in enumerate(boxes)]

        shards = write_shards(Boxes(), tmp_path / "shards", ShardSettings())
        with ShardSet.open(shards.folder) as shard_set:
            assert shard_set.samples["extension"].to_pylist() == ["png"] * len(self.BOXES)
            # One at a time, as queries are: sums over larger batches may be taken in another order.
            encoder, settings = engine.index.load_encoder(), EmbedSettings(batch_size=1)
            embeddings = embed_shards(encoder, shard_set, tmp_path / "embeddings", settings=settings)
        for box in self.BOXES:
            asyncio.run(engine.search_by_picture(photo, SearchParameters(), roi=box))
        np.testing.assert_array_equal(np.stack(searched), embeddings.vectors()[np.argsort(embeddings.ids)])
        assert len(np.unique(searched, axis=0)) == len(self.BOXES)

    @pytest.mark.parametrize(
        ("roi", "reason"),
        [
            ((5, 5, 5, 9), "empty"),
            ((9, 5, 5, 9), "empty"),
            ((0, 4.6, 9, 5.4), "empty"),
            ((480, 0, 490, 9), "outside"),
            ((0, 640, 9, 700), "outside"),
            ((-9, -9, 0, 9), "outside"),
        ],
    )
    def test_a_region_without_a_pixel_of_the_picture_is_refused(
        self, engine: QueryEngine, photo: bytes, roi: Sequence[int | float], reason: str
    ) -> None:
        with pytest.raises(UnsearchableRegionError) as refusal:
            asyncio.run(engine.search_by_picture(photo, SearchParameters(), roi=roi))
        assert refusal.value.reason == reason

    def test_a_region_of_a_broken_picture_is_not_blamed(self, engine: QueryEngine, photo: bytes) -> None:
        with pytest.raises(DecodeError):
            asyncio.run(engine.search_by_picture(photo[:2000], SearchParameters(), roi=(0, 0, 9, 9)))
