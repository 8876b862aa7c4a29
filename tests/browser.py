"""A real browser without a window, Debian's Chromium, and what it saw as pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

PICTURES = Path(__file__).parents[1] / ".screenshots"
"""Ignored by Git."""


@contextmanager
def chromium(width: int, height: int, **preferences: int) -> Iterator[Chrome]:
    """A browser with a window of some pixels, and preferences of a profile, for the time of a block."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", preferences)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options, Service("/usr/bin/chromedriver"))
    try:
        yield browser
    finally:
        browser.quit()


def screenshot(browser: Chrome, name: str) -> None:
    """Keep what the browser shows, to be looked at."""
    PICTURES.mkdir(exist_ok=True)
    browser.save_screenshot(str(PICTURES / f"{name}.png"))
