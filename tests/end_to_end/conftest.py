"""Fixtures of the tests in a browser."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium import webdriver


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    from tests.end_to_end.chromium_page import start_chromium  # Not all tests here need selenium.

    browser = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()
