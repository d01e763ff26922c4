"""A real headless Chromium, driven through selenium."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--disable-dev-shm-usage",
)


@contextmanager
def chromium(folder: Path, width: int = 1600, height: int = 1000, scale: float = 1.0) -> Iterator[Any]:
    """A browser with a profile of its own in ``folder``; its console is kept for ``console_errors``."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise FileNotFoundError("wanted chromium and chromedriver; on Debian: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.add_argument(f"--force-device-scale-factor={scale}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def until(browser: Any, script: str, what: str, timeout: float = 60) -> Any:
    """Wait until JavaScript returns something true, and return it."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        return WebDriverWait(browser, timeout, poll_frequency=0.25).until(lambda page: page.execute_script(script))
    except TimeoutException:
        raise AssertionError(f"not within {timeout:g} s: {what}; console: {console(browser)}") from None


def console(browser: Any, keep: Callable[[str], bool] = lambda level: True) -> list[str]:
    """What the page has written to its console since the last call."""
    return [f"{entry['level']}: {entry['message']}" for entry in browser.get_log("browser") if keep(entry["level"])]


def console_errors(browser: Any) -> list[str]:
    return console(browser, lambda level: level in ("SEVERE", "WARNING"))


SOURCES = """
const doc = window.Bokeh && Bokeh.documents[0];
if (!doc) return null;
const found = {};
for (const model of doc._all_models.values())
  if (model.type === "Figure" || model.type === "Plot") {
    const lengths = model.renderers.filter(r => r.data_source).map(r => r.data_source.get_length() || 0);
    found[model.title.text] = Math.max(0, ...lengths);
  }
return found;
"""
"""Rows drawn in each figure of a Bokeh page, by its title."""
