"""The search page in headless Chromium, as a person sees it. Needs selenium."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
DESKTOP, PHONE = (1200, 900), (390, 844)
IN_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: run .ci/install_browser"),
]
_FLAGS = (
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
_SECONDS_TO_WAIT = 20


def start_chromium(profile: Path) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(str(DRIVER)))


class Page:
    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, query: str = "") -> None:
        self.browser.get(self.url + query)
        self.wait_until_settled()

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        # In one script: element by element, the page could replace them in between.
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        texts: list[str] = self.run(script, selector)
        return texts

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, condition: Callable[[], Any]) -> None:
        # A condition may look at an element that the page replaces just then: it is asked again.
        stale = (StaleElementReferenceException,)
        wait = WebDriverWait(self.browser, _SECONDS_TO_WAIT, poll_frequency=0.05, ignored_exceptions=stale)
        wait.until(lambda _: condition())

    def wait_until_settled(self) -> None:
        """Until nothing is being searched and every picture near the window is drawn."""
        script = (
            "return !document.querySelector('[aria-busy]') && "
            "[...document.images].filter((image) => image.checkVisibility()).every((image) => "
            "image.complete || image.getBoundingClientRect().top > innerHeight)"
        )
        shown = ".card, #problem:not([hidden]), #heading:not(:empty)"
        self.wait_for(lambda: self.all(shown) and self.run(script))

    def wait_for_query(self, name: str) -> None:
        self.wait_for(lambda: self.browser.title == f"{name} · Lookalike")
        self.wait_until_settled()

    def wait_for_heading(self, heading: str) -> None:
        self.wait_for(lambda: self.one("#heading").text == heading)
        self.wait_until_settled()

    def upload(self, picture: Path) -> None:
        self.one("#picker").send_keys(str(picture))
        self.wait_for(lambda: self.texts("#query-name small") == [picture.name] or self.all("#problem:not([hidden])"))
        self.wait_until_settled()

    def act(self, selector: str) -> None:
        """Clicks, and waits for the search that this makes."""
        before = self.state()
        self.one(selector).click()
        self.wait_for(lambda: self.state() != before)
        self.wait_until_settled()

    def state(self) -> dict[str, Any]:
        """What the history holds of what is shown."""
        state: dict[str, Any] = self.run("return history.state")
        return state

    def found_ids(self, grid: str = "#columns") -> list[int]:
        script = "return [...document.querySelectorAll(arguments[0])].map((card) => Number(card.dataset.id))"
        ids: list[int] = self.run(script, f"{grid} .card")
        return ids

    def focused(self, attribute: str = "id") -> str | None:
        focused: str | None = self.run("return document.activeElement.getAttribute(arguments[0])", attribute)
        return focused

    def hold_answers(self, text: str) -> None:
        """Requests with this text in their address or body are sent, and cannot be called back, but their answers wait
        for `release_answers`. Ends with the document."""
        script = """
            const [text, fetchNow] = [arguments[0], window.fetch];
            const released = new Promise((resolve) => (window.releaseAnswers = resolve));
            window.numHeld = 0;
            window.fetch = async (url, { signal, ...options } = {}) => {
              const isLate = `${url} ${options.body}`.includes(text) && !window.holdsNoMore;
              if (!isLate) return fetchNow(url, { signal, ...options });
              const response = await fetchNow(url, options);
              const body = await response.arrayBuffer();
              window.numHeld += 1;
              await released;
              return new Response(body, response);
            };
        """
        self.run(f"window.holdsNoMore = false; {script}", text)

    def wait_for_held_answers(self, count: int = 1) -> None:
        """Until so many wait; answers to later requests come at once."""
        self.wait_for(lambda: self.run("return window.numHeld") == count)
        self.run("window.holdsNoMore = true")

    def release_answers(self) -> None:
        """Until the page has read them."""
        script = """
            const done = arguments[0];
            window.releaseAnswers();
            setTimeout(() => new Response("read after those").text().then(() => setTimeout(done)));
        """
        self.browser.execute_async_script(script)
        self.wait_until_settled()

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def press(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser).send_keys(*keys).perform()

    def press_with_shift(self, *keys: str) -> None:
        webdriver.ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(*keys).key_up(Keys.SHIFT).perform()

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse, over the crop area; points are shares of the area's width and height."""
        area = self.one("#crop")
        width, height = area.size["width"], area.size["height"]
        actions = webdriver.ActionChains(self.browser, duration=50)
        points = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in (start, end)]
        actions.move_to_element_with_offset(area, *points[0]).click_and_hold()
        actions.move_to_element_with_offset(area, *points[1]).release().perform()

    def swipe(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """As `drag`, with a finger."""
        box = self.run("const {x, y, width, height} = document.getElementById('crop').getBoundingClientRect();"
                       "return [x, y, width, height]")  # fmt: skip
        points = [{"x": box[0] + x * box[2], "y": box[1] + y * box[3]} for x, y in (start, end)]
        for kind, touched in (("Start", points[:1]), ("Move", points[1:]), ("End", [])):
            self.browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": touched})

    def names_of_controls(self) -> list[tuple[str, str]]:
        """Role and name of all that can be operated, as a screen reader is told."""
        nodes = self.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        roles = {"button", "combobox", "slider", "textbox", "link", "DisclosureTriangle", "image"}
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in shown
            if node["role"]["value"] in roles
        ]

    def addresses_asked(self) -> set[str]:
        """All that the browser has asked any server for since this was asked last."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        opened = [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
        not_servers = ("data:", "blob:", "chrome:", "chrome-untrusted:")
        return {address for address in asked + opened if not address.startswith(not_servers)}

    def require_good_behaviour(self) -> None:
        """That no script failed, no policy was violated, and no other server was asked for anything."""
        # What a server refuses is in the console, too.
        complaints = [e["message"] for e in self.browser.get_log("browser") if "status of 4" not in e["message"]]
        assert not complaints, complaints
        asked = self.addresses_asked()
        assert asked
        assert all(address.startswith(self.url) for address in asked), asked
