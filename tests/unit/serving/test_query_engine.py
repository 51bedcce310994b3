"""What the engine promises beyond its answers, which test_api.py compares with brute force."""

import asyncio
import threading
from typing import Any

import pytest

from indexing.published_index import PublishedIndex
from serving.query_engine import QueryEngine


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, threading.Thread]]:
    """Fills with what is used of an index, and on which thread."""
    uses: list[tuple[str, threading.Thread]] = []
    search, ids = PublishedIndex.search, PublishedIndex.ids.func

    def search_recorded(self: PublishedIndex, *arguments: Any) -> Any:
        uses.append(("search", threading.current_thread()))
        return search(self, *arguments)

    def ids_recorded(self: PublishedIndex) -> Any:
        uses.append(("ids", threading.current_thread()))
        return ids(self)

    monkeypatch.setattr(PublishedIndex, "search", search_recorded)
    monkeypatch.setattr(PublishedIndex, "ids", property(ids_recorded))
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
