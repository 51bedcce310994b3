"""Two versions of the index side by side on the search page; v0002 serves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lookalike.api_client import ApiClient
from tests.unit.serving.small_index import NUM_PICTURES, SmallIndex, add_version, make_small_index

pytest.importorskip("selenium", reason="needs selenium: install lookalike with the extra [dev]")
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from tests.end_to_end.chromium_page import DESKTOP, IN_CHROMIUM, PHONE, Page
from tests.end_to_end.server_process import new_key, running_server

pytestmark = IN_CHROMIUM

SERVED, OTHER = "#grid", "#other-grid"


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    folder = tmp_path_factory.mktemp("compared")
    made = make_small_index(folder)
    add_version(made, folder / "other_embeddings", seed=1)
    return made


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory, two_versions: SmallIndex) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("server"), two_versions.index) as url:
        yield url


@pytest.fixture
def page(browser: webdriver.Chrome, server_url: str) -> Iterator[Page]:
    page = Page(browser, server_url)
    page.resize(DESKTOP)
    yield page
    page.require_good_behaviour()


def search_both(page: Page, query: Any = None, k: int = 12, **options: Any) -> tuple[list[int], list[int]]:
    """Ids that v0002 and v0001 find."""
    with ApiClient(page.url) as client:
        served, other = (client.search(query, k=k, version=version, **options) for version in (None, "v0001"))
    assert (served.index_version, other.index_version) == ("v0002", "v0001")
    return [hit.id for hit in served.hits], [hit.id for hit in other.hits]


def changes(ids: list[int], others: list[int]) -> list[str]:
    named = []
    for rank, id in enumerate(ids):
        climbed = others.index(id) - rank if id in others else None
        named.append("only here" if climbed is None else f"up {climbed}" if climbed > 0 else f"down {-climbed}")
    return ["" if change == "down 0" else change for change in named]


def open_with_twelve(page: Page, query: str) -> None:
    page.open(query)
    page.one("#count").send_keys("12")
    page.wait_for(lambda: len(page.found_ids(SERVED)) == 12)
    page.wait_until_settled()


def test_a_version_is_chosen_with_the_keyboard_and_what_differs_is_said(page: Page) -> None:
    open_with_twelve(page, "?id=3")
    page.wait_for(lambda: page.one("#versus").is_displayed())
    assert page.texts("#versus option") == ["none", "v0001"]
    assert ("combobox", "Compare with") in page.names_of_controls()
    assert not page.one("#other").is_displayed()
    page.run("document.getElementById('versus').focus()")
    page.press("v")
    page.wait_for(lambda: page.state()["versus"] == "v0001")
    page.wait_until_settled()
    assert page.focused() == "versus"
    assert page.browser.current_url.endswith("?id=3&with=v0001")
    assert page.texts(".columns h3") == ["v0002, serving", "v0001"]
    served, other = search_both(page, id=3)
    assert page.found_ids(SERVED) == served
    assert page.found_ids(OTHER) == other
    assert page.texts(f"{SERVED} .change") == changes(served, other)
    assert page.texts(f"{OTHER} .change") == changes(other, served)
    assert {"only here", ""} < {*changes(served, other)}  # and some that moved
    for grid in (SERVED, OTHER):
        assert page.texts(f"{grid} .rank") == [str(rank) for rank in range(1, 13)]
    num_same = len({*served} & {*other})
    num_moved = sum(change not in ("", "only here") for change in changes(served, other))
    summary = (
        f"From v0001 to v0002: {num_same} of 12 the same, {num_moved} of them moved; "
        f"{12 - num_same} new, {12 - num_same} gone."
    )
    assert page.texts("#comparison") == [summary]
    assert page.texts("[role=status]")[0].endswith(summary)
    first_new = changes(served, other).index("only here")
    spoken = page.all(f"{SERVED} .card")[first_new].get_attribute("aria-label")
    assert str(spoken).startswith(f"Rank {first_new + 1}, only here: ")
    page.press(Keys.ARROW_UP)
    page.wait_for(lambda: page.state()["versus"] is None)
    page.wait_until_settled()
    assert page.found_ids() == served
    assert page.browser.current_url.endswith("?id=3")
    assert not page.one("#comparison").is_displayed()
    assert not page.one(".place").is_displayed()


def test_arrows_lead_from_one_version_to_the_other(page: Page) -> None:
    page.open("?id=3&with=v0001")
    served, other = page.found_ids(SERVED), page.found_ids(OTHER)
    page.run("document.querySelector('#grid .card').focus()")
    page.press(Keys.ARROW_DOWN)
    assert page.focused("data-id") == str(served[1])
    page.press(Keys.ARROW_RIGHT)
    assert page.focused("data-id") == str(other[1])
    page.press(Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert page.focused("data-id") == str(served[0])


def test_a_picture_and_its_region_go_through_the_encoders_of_both(page: Page, two_versions: SmallIndex) -> None:
    page.open("?with=v0001")
    picture = two_versions.pictures / "ring" / "teal.png"
    page.upload(picture)
    served, other = search_both(page, picture.read_bytes(), k=NUM_PICTURES)
    assert served != other
    assert [page.found_ids(SERVED), page.found_ids(OTHER)] == [served, other]
    assert page.browser.current_url.endswith("/?with=v0001")
    page.one("#crop-start").click()
    page.wait_for(lambda: page.one("#crop-apply").is_displayed())
    page.act("#crop-apply")
    roi = page.state()["parts"][0]["roi"]
    served, other = search_both(page, picture.read_bytes(), k=NUM_PICTURES, roi=roi)
    assert [page.found_ids(SERVED), page.found_ids(OTHER)] == [served, other]


def test_pages_conditions_more_like_this_and_the_history_keep_the_comparison(page: Page) -> None:
    open_with_twelve(page, "?id=3&with=v0001")
    served, other = search_both(page, id=3, k=NUM_PICTURES)
    page.act("#next")
    assert [page.found_ids(SERVED), page.found_ids(OTHER)] == [served[12:], other[12:]]
    assert page.texts(f"{OTHER} .rank") == [str(rank) for rank in range(13, NUM_PICTURES)]
    assert page.texts(f"{OTHER} .change") == changes(other, served)[12:]  # across the pages
    assert page.one("#comparison").text.startswith(f"From v0001 to v0002: 23 of the first {NUM_PICTURES - 1} the same")
    page.act("#previous")
    page.act(f"{OTHER} li:nth-child(2) .more")
    address = page.browser.current_url
    assert address.endswith(f"?id=3&id={other[1]}&with=v0001")
    page.one("#filters summary").click()
    page.one("[name=value]").send_keys("disc", Keys.ENTER)
    page.wait_for(lambda: page.state()["conditions"])
    page.wait_until_settled()
    assert {*page.texts(f"{SERVED} .label"), *page.texts(f"{OTHER} .label")} == {"disc"}
    page.browser.back()
    page.wait_for(lambda: page.browser.current_url == address)
    page.wait_until_settled()
    together = [page.found_ids(SERVED), page.found_ids(OTHER)]
    assert len({*map(tuple, together)}) == 2
    page.act(f"{OTHER} .card")
    assert page.state()["versus"] == "v0001"
    assert page.texts(".columns h3") == ["v0002, serving", "v0001"]
    page.open(f"?{address.partition('?')[2]}")
    assert page.found_ids(SERVED)[:12] == together[0]
    assert page.found_ids(OTHER)[:12] == together[1]


def test_what_goes_wrong_with_the_other_version_is_said_in_its_column_alone(page: Page) -> None:
    page.open("?id=3&with=v0999")
    page.wait_for(lambda: page.one("#other-problem").is_displayed())
    assert "v0999" in page.one("#other-problem").text
    assert not page.one("#problem").is_displayed()
    assert page.found_ids() == search_both(page, id=3, k=NUM_PICTURES)[0]
    assert page.texts(f"{SERVED} .rank")[:2] == ["1", "2"]
    page.wait_for(lambda: page.texts("#versus option") == ["none", "v0999", "v0001"])
    page.one("#versus").send_keys("v0001")
    page.wait_for(lambda: page.state()["versus"] == "v0001")
    page.wait_until_settled()
    assert not page.one("#other-problem").is_displayed()
    assert len(page.found_ids(OTHER)) == NUM_PICTURES - 1


@pytest.mark.parametrize("version", ["1", "v1", "../v0001", "<script>"])
def test_a_foreign_address_names_no_version(page: Page, version: str) -> None:
    page.open(f"?id=3&with={version}")
    assert page.state()["versus"] is None
    assert not page.one("#other").is_displayed()


def test_the_version_that_serves_does_not_wait_for_the_other(page: Page) -> None:
    page.open("?id=3")
    page.wait_for(lambda: page.one("#versus").is_displayed())
    page.hold_answers('"version":"v0001"')
    page.one("#versus").send_keys("v0001")
    page.wait_for_held_answers()
    page.wait_for(lambda: page.texts("#other-note") == ["Searching …"])
    served = page.found_ids()
    assert len(served) == NUM_PICTURES - 1
    page.run("document.querySelector('#grid .card').click()")
    page.wait_for(lambda: f"?id={served[0]}&" in page.browser.current_url)
    page.wait_until_settled()
    shown, summary = page.found_ids(), page.texts("#comparison")
    page.release_answers()  # of the search before
    assert page.found_ids() == shown
    assert page.texts("#comparison") == summary


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_both_columns_fit_every_screen(page: Page, size: tuple[int, int]) -> None:
    page.resize(size)
    page.open("?id=3&with=v0001")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    summary, served, other = (page.one(selector).rect for selector in ("#comparison", SERVED, OTHER))
    assert summary["y"] + summary["height"] <= served["y"]
    assert served["y"] == other["y"]
    assert min(served["width"], other["width"]) > 150
    assert served["x"] + served["width"] < other["x"]


def test_a_key_for_searching_is_enough(browser: webdriver.Chrome, two_versions: SmallIndex, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key = new_key(keys)
    with running_server(tmp_path, two_versions.index, keys=str(keys)) as url:
        page = Page(browser, url)
        page.resize(DESKTOP)
        page.open("?id=3&with=v0001")
        page.one("#key").send_keys(key, Keys.ENTER)
        page.wait_for(lambda: len(page.found_ids(OTHER)) == NUM_PICTURES - 1)
        page.wait_for(lambda: page.texts("#versus option") == ["none", "v0001"])
        page.wait_until_settled()
        page.require_good_behaviour()


def test_a_server_that_compares_nothing_offers_nothing(
    browser: webdriver.Chrome, two_versions: SmallIndex, tmp_path: Path
) -> None:
    settings = {"vectors_only": True, "max_compared_versions": 0}
    with running_server(tmp_path, two_versions.index, engine=settings) as url:
        page = Page(browser, url)
        page.open("?id=3")
        page.wait_for(lambda: page.one("#version").text == "· index v0002")
        assert not page.one("#versus").is_displayed()
        page.require_good_behaviour()
        assert f"{url}/v1/indexes" not in page.addresses_asked()
