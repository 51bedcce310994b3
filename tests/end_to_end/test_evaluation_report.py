"""The report of an evaluation in a real browser, opened from disk."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from evaluation.reporting.folder import write_report
from evaluation.reporting.values import ConfusingPicture, Contender, Gallery, PrecisionRecall, ShownPicture
from evaluation.result import CurvePoint, Result, Section

pytest.importorskip("selenium", reason="needs selenium: install lookalike with the extra [dev]")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

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
DESKTOP, PHONE = (1280, 900), (390, 844)
LONG_NAME = "an encoder whose name somebody wrote down at great length, " + "with_one_word_that_does_not_end" * 4

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver: run .ci/install_browser"),
]


KINDS: tuple[Literal["relevant", "junk", "unrelated"], ...] = ("relevant", "junk", "unrelated")


def picture(name: str, kind: Literal["query", "relevant", "junk", "unrelated"]) -> ShownPicture:
    stream = io.BytesIO()
    Image.new("RGB", (96, 64), "teal").save(stream, "JPEG")
    return ShownPicture(name, kind, stream.getvalue(), 0.5)


def result(seed: int) -> Result:
    generator = np.random.default_rng(seed)
    names, clusters = tuple(f"query {number}" for number in range(30)), np.arange(30) // 3
    sections = {
        section: Section(names, clusters, {metric: generator.random(30) for metric in ("map", "mp@10")})
        for section in ("easy", "medium", "hard")
    }
    curve = [CurvePoint(count, dict.fromkeys(sections, 0.5 - count / 10**7)) for count in (0, 10_000, 1_001_001)]
    record = {"protocol": "official", "num_distractors": 1_001_001, "ground_truth": "8f3a" * 16}
    return Result("roxford5k", sections, record, (f"{LONG_NAME} is doubtful.",), curve)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "report"
    ranking = [picture(f"picture {place}", KINDS[place % 3]) for place in range(10)]
    ranking[4] = ShownPicture(LONG_NAME, "junk", jpeg=None)
    write_report(
        folder,
        result(0),
        name=LONG_NAME,
        title=LONG_NAME,
        command=f"lookalike evaluate {LONG_NAME}",
        baselines=[Contender("before", result(1))],
        galleries=[Gallery("hard", picture(f"query {place}", "query"), ranking, ranking[3:6]) for place in range(2)],
        confusing=[ConfusingPicture(shown, 12, 3) for shown in ranking],
        precision_recall=[PrecisionRecall("hard", [0.0, 0.5, 1.0], [1.0, 0.7, 0.1])],
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield browser
    browser.quit()


def open_page(browser: webdriver.Chrome, report: Path, size: tuple[int, int], scheme: str) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(report.as_uri())


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_screen_and_asks_for_nothing(
    browser: webdriver.Chrome, report: Path, tmp_path: Path, size: tuple[int, int], scheme: str
) -> None:
    open_page(browser, report, size, scheme)
    run = browser.execute_script
    assert run("return document.documentElement.scrollWidth <= window.innerWidth")
    asked = run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [address for address in asked if not address.startswith("data:")] == []
    assert run("return [...document.images].length") > 20
    assert run("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert run(
        "return [...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().height > 100)"
    ) == ([True] * 3)
    assert browser.get_log("browser") == [], "the browser's console has errors; a policy violation would be one of them"
    screenshot = tmp_path / "report.png"
    assert browser.save_screenshot(str(screenshot))
    assert screenshot.stat().st_size > 10_000


def test_figures_are_drawn_inside_their_frames(browser: webdriver.Chrome, report: Path) -> None:
    open_page(browser, report, DESKTOP, "light")
    script = """
        return [...document.querySelectorAll("svg")].flatMap((svg) => {
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")]
            .filter((text) => {
              const box = text.getBoundingClientRect();
              return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
            })
            .map((text) => text.textContent);
        });
    """
    assert browser.execute_script(script) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_it_stands_on(browser: webdriver.Chrome, report: Path, scheme: str) -> None:
    open_page(browser, report, DESKTOP, scheme)
    script = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
    on_sheet = ("ink", "soft", "good", "junk", "bad", *(f"series-{number}" for number in range(1, 6)))
    pairs = [*((name, "sheet") for name in on_sheet), ("ink", "paper"), ("soft", "paper"), ("warn", "warn-paper")]
    for text, ground in pairs:
        colours = [browser.execute_script(script, f"--{name}").strip() for name in (text, ground)]
        assert contrast(*colours) >= 4.5, (text, ground)  # WCAG 2.1, 1.4.3, level AA
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map((t) => getComputedStyle(t).fill)"
    )
    sheet = browser.execute_script(script, "--sheet").strip()
    for colour in set(drawn):  # such as rgb(29, 35, 33)
        assert contrast("#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)), sheet) >= 4.5


def contrast(first: str, second: str) -> float:
    """Of two colours such as `#1d2321`. Source: WCAG 2.1, "contrast ratio" and "relative luminance"."""
    darker, lighter = sorted(map(luminance, (first, second)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
