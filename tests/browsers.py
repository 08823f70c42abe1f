"""Chromium for the tests of pages: a browser without a screen, how wide and how dark it is, what it asked and reported.

Tests that use it are marked `needs_browser`: they are skipped where there is no Chromium with its driver.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from selenium import webdriver

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver")
OVERFLOWS = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"


def open_browser() -> Iterator[Any]:
    """A browser, whose pages keep the errors of their scripts in `failures`; for a fixture."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    listen = "window.failures = []; addEventListener('error', e => failures.push(e.message));"
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": listen})
    yield driver
    driver.quit()


def forget_logs(browser: Any) -> None:
    """Forget what was logged so far."""
    for log in ("browser", "performance"):
        browser.get_log(log)


def requests_of(browser: Any) -> list[str]:
    """The addresses that were asked for since the logs were forgotten."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def look(browser: Any, *, width: int = 1440, scheme: str = "light") -> None:
    """Set how wide the window is, and whether it is light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    # two frames on, the page has been told and has drawn
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")


def colours(page: Any, selector: str) -> list[list[float]]:
    """An element's colour, and the first opaque background behind it."""
    found = page.execute_script(
        """let e = document.querySelector(arguments[0]); const own = getComputedStyle(e), fill = own.fill;
           const text = e instanceof SVGElement ? fill : own.color;
           while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
           return [text, getComputedStyle(e).backgroundColor]""",
        selector,
    )
    return [rgb(text) for text in found]


def rgb(text: str) -> list[float]:
    """A colour as CSS writes it, as numbers to 255."""
    if text.startswith("#"):
        return [float(int(text[at : at + 2], 16)) for at in (1, 3, 5)]
    return [float(part) for part in re.findall(r"[\d.]+", text)[:3]]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: Sequence[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
