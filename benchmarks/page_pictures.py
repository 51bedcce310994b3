"""The pictures of the search page in the documentation, taken from a running server in headless Chromium.

lookalike demo; lookalike serve --index demo_run/index                   the server, in another terminal
python benchmarks/page_pictures.py http://127.0.0.1:8000 --class lion    ten seconds

Where the index has an earlier version, such as one of demo_run/embeddings/frozen, one more picture compares the two.
Needs selenium (extra [dev]), chromium and chromedriver. What they show is found by the server then and there.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from lookalike.api_client import ApiClient

FOLDER = Path(__file__).parent.parent / "docs" / "images"
DESKTOP, PHONE = (1200, 900), (390, 844)
SECONDS_TO_WAIT = 30
# What a browser without a screen points with, which it would otherwise guess from the machine.
MOUSE = ("--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",)
FINGERS = ("--blink-settings=primaryHoverType=1,availableHoverTypes=1,primaryPointerType=2,availablePointerTypes=2",)
SETTLED = (
    "return !document.querySelector('[aria-busy]') && document.querySelector('.card') && [...document.images]"
    ".filter((image) => image.checkVisibility() && image.getBoundingClientRect().top < innerHeight)"
    ".every((image) => image.complete)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="Of a running server.")
    parser.add_argument("--class", dest="class_name", required=True, help="Class of the picture that is searched by.")
    parser.add_argument("--save", type=Path, default=FOLDER, help="Folder for the pictures.")
    arguments = parser.parse_args()
    with ApiClient(arguments.url) as client:
        page = client.items(filter={"column": "class_name", "equals": arguments.class_name}, limit=1)
        indexes = client.versions()
        others = [one.version for one in indexes.versions if one.version != indexes.served]
    if not page.items:
        raise SystemExit(f"{arguments.url} has no picture of class {arguments.class_name!r}.")
    address = f"{arguments.url}/?id={page.items[0].id}"
    with tempfile.TemporaryDirectory() as profile:
        browser = start_browser(profile, *MOUSE)
        try:
            take(browser, address, arguments.save / "search_page.png", DESKTOP, "light")
            take_crop(browser, address, arguments.save / "search_page_crop.png")
            for version in others[-1:]:
                file = arguments.save / "search_page_versions.png"
                take(browser, f"{address}&with={version}", file, DESKTOP, "light")
        finally:
            browser.quit()
    with tempfile.TemporaryDirectory() as profile:
        browser = start_browser(profile, *FINGERS)
        try:
            take(browser, address, arguments.save / "search_page_phone.png", PHONE, "dark")
        finally:
            browser.quit()


def start_browser(profile: str, *flags: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))


def show(browser: webdriver.Chrome, address: str, size: tuple[int, int], scheme: str) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(address)
    wait_until_settled(browser)


def wait_until_settled(browser: webdriver.Chrome) -> None:
    WebDriverWait(browser, SECONDS_TO_WAIT).until(lambda _: browser.execute_script(SETTLED))


def take(browser: webdriver.Chrome, address: str, file: Path, size: tuple[int, int], scheme: str) -> None:
    show(browser, address, size, scheme)
    save(browser, file)


def take_crop(browser: webdriver.Chrome, address: str, file: Path) -> None:
    """With the box open, a condition set, and another picture that is not wanted."""
    show(browser, address, DESKTOP, "light")
    unwanted = browser.execute_script("return document.querySelector('.card:not(.same)').dataset.id")
    show(browser, f"{address}&unlike={unwanted}", DESKTOP, "light")
    browser.find_element(By.ID, "crop-start").click()
    WebDriverWait(browser, SECONDS_TO_WAIT).until(lambda _: browser.find_element(By.ID, "crop-apply").is_displayed())
    browser.execute_script("document.getElementById('filters').open = true")
    wait_until_settled(browser)
    save(browser, file)


def save(browser: webdriver.Chrome, file: Path) -> None:
    if not browser.save_screenshot(str(file)):
        raise SystemExit(f"{file} could not be written.")
    print(file)


if __name__ == "__main__":
    main()
