"""The search page in a real browser against a real server, the way a person uses it."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving.small_index import NUM_PICTURES, SmallIndex, make_small_index

pytest.importorskip("selenium", reason="needs selenium: install lookalike with the extra [dev]")
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
CHROMIUM_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS_TO_WAIT = 20
DESKTOP, PHONE = (1200, 900), (390, 844)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: run .ci/install_browser"),
]


class Page:
    """The search page as a person sees it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, query: str = "") -> None:
        self.browser.get(self.url + query)
        self.wait_until_settled()

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, condition: Callable[[], Any]) -> None:
        # A condition may look at an element that the page replaces just then: it is asked again.
        stale = (StaleElementReferenceException,)
        wait = WebDriverWait(self.browser, SECONDS_TO_WAIT, poll_frequency=0.05, ignored_exceptions=stale)
        wait.until(lambda _: condition())

    def wait_until_settled(self) -> None:
        """Until nothing is being searched and every picture is drawn."""
        script = (
            "return !document.querySelector('[aria-busy]') && [...document.images].every((image) => image.complete)"
        )
        self.wait_for(lambda: self.all(".card, #problem:not([hidden])") and self.run(script))

    def wait_for_query(self, name: str) -> None:
        self.wait_for(lambda: self.browser.title == f"{name} · Lookalike")
        self.wait_until_settled()

    def upload(self, picture: Path) -> None:
        self.one("#picker").send_keys(str(picture))
        self.wait_for_query("Your picture")

    def found_ids(self) -> list[int]:
        # In one script: card by card, the page could replace them in between.
        ids: list[int] = self.run(
            "return [...document.querySelectorAll('.card')].map((card) => Number(card.dataset.id))"
        )
        return ids

    def focused_id(self) -> str:
        return str(self.run("return document.activeElement.id"))

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()


@pytest.fixture(scope="module")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return make_small_index(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="module")
def server_url(small_index: SmallIndex) -> Iterator[str]:
    command = [sys.executable, "-m", "serving", "--index", str(small_index.index), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield json.loads(server.stdout.readline())["url"]
        server.send_signal(signal.SIGINT)
    assert server.returncode == 0


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, server_url: str) -> Iterator[Page]:
    page = Page(browser, server_url)
    page.resize(DESKTOP)
    page.open()
    yield page
    complaints = [entry for entry in browser.get_log("browser") if "/v1/search" not in entry["message"]]
    assert not complaints, "the browser's console has errors; a policy violation would be one of them"


def test_it_begins_with_random_pictures_to_start_from(page: Page) -> None:
    assert page.one("h2").text == "Or start from one of these"
    first = page.found_ids()
    assert sorted(first) == list(range(NUM_PICTURES))
    assert page.one("#num-pictures").text == f"{NUM_PICTURES} pictures"
    page.one("#shuffle").click()
    page.wait_for(lambda: page.found_ids() != first)


def test_an_uploaded_picture_is_shown_with_its_nearest_ones(page: Page, small_index: SmallIndex) -> None:
    page.upload(small_index.pictures / "ring" / "teal.png")
    assert page.one("h2").text == "Nearest pictures"
    assert page.one("#query-picture").is_displayed()
    assert page.one("#query-name").text == "Your picture\nteal.png"
    first = page.all(".card")[0]
    assert first.find_element(By.CSS_SELECTOR, ".label").text == "ring"
    assert first.find_element(By.CSS_SELECTOR, ".value").text == "1.00"
    assert first.get_attribute("aria-label") == "ring, similarity 1.00. Search by this picture"
    assert len(page.found_ids()) == NUM_PICTURES
    widths = [bar.size["width"] for bar in page.all(".fill")]
    assert widths == sorted(widths, reverse=True)
    assert [row.text for row in page.all("#timings dt")] == ["decode", "encode", "search", "metadata", "queue", "total"]


def test_a_card_searches_by_its_picture_and_the_history_leads_back_and_forth(
    page: Page, small_index: SmallIndex
) -> None:
    page.upload(small_index.pictures / "disc" / "gold.jpg")
    by_upload = page.found_ids()
    page.all(".card")[0].click()
    page.wait_for_query("disc")
    by_item = page.found_ids()
    assert page.browser.current_url.endswith(f"?id={by_upload[0]}")
    assert by_upload[0] not in by_item
    assert page.all(".card.same")
    assert page.focused_id() == "heading"
    page.browser.back()
    page.wait_for_query("Your picture")
    assert page.found_ids() == by_upload
    page.browser.forward()
    page.wait_for_query("disc")
    assert page.found_ids() == by_item
    page.browser.refresh()
    page.wait_for_query("disc")
    assert page.found_ids() == by_item


def test_the_keyboard_is_enough(page: Page, small_index: SmallIndex) -> None:
    page.press("/")
    assert page.focused_id() == "picker"
    assert page.run("return getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    page.upload(small_index.pictures / "square" / "teal.png")
    page.press(Keys.TAB)
    focused = page.browser.switch_to.active_element
    assert focused.get_attribute("data-id") == str(page.found_ids()[0])
    page.press(Keys.ENTER)
    page.wait_for_query("square")
    assert page.one("#announcement").get_attribute("textContent").startswith("Nearest pictures: ")
    found = page.found_ids()
    page.one(".skip").send_keys(Keys.ENTER)
    page.wait_until_settled()
    assert page.found_ids() == found
    assert page.focused_id() == "heading"
    page.press(Keys.TAB)
    assert page.browser.switch_to.active_element.get_attribute("data-id") == str(found[0])


def test_a_fragment_in_the_address_leaves_what_was_found(page: Page) -> None:
    page.open("?id=3")
    found = page.found_ids()
    script = (
        "const done = arguments[0]; addEventListener('hashchange', () => setTimeout(done)); location.hash = 'results'"
    )
    page.browser.execute_async_script(script)
    page.wait_until_settled()
    assert page.found_ids() == found


def test_pictures_can_be_dropped_and_pasted(page: Page, small_index: SmallIndex) -> None:
    script = """
        const [event, name] = arguments;
        const blob = await (await fetch(document.querySelector(".card img").src)).blob();
        const transfer = new DataTransfer();
        transfer.items.add(new File([blob], name, { type: blob.type }));
        document.body.dispatchEvent(
          event === "paste"
            ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
            : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }),
        );
    """
    for event in ("drop", "paste"):
        page.open()
        page.run(script, event, f"{event}.png")
        page.wait_for_query("Your picture")
        assert page.one("#query-name small").text == f"{event}.png"
        assert page.all(".value")[0].text == "1.00"


def test_a_refused_picture_says_why_and_the_next_one_works(page: Page, small_index: SmallIndex, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.upload(tmp_path / "notes.png")
    alert = page.one("[role=alert]")
    assert alert.is_displayed()
    assert "Send a picture, such as a JPEG" in alert.text
    assert "Request " in alert.text
    assert not page.all(".card")
    page.upload(small_index.pictures / "disc" / "teal.png")
    page.wait_for(lambda: page.all(".card"))
    assert not alert.is_displayed()


def test_the_number_of_pictures_can_be_chosen(page: Page) -> None:
    page.open("?id=3")
    page.one("#count").send_keys("12")
    page.wait_for(lambda: len(page.found_ids()) == 12)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_and_asks_only_its_own_server(
    page: Page, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    page.resize(size)
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.open("?id=3")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    is_dark = page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 23, 22)"
    assert is_dark == (scheme == "dark")
    asked = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(asked) > NUM_PICTURES / 2
    assert all(address.startswith(page.url) for address in asked)
    screenshot = tmp_path / "search_page.png"
    assert page.browser.save_screenshot(str(screenshot))
    assert screenshot.stat().st_size > 10_000
