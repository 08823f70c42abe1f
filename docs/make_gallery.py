"""Make docs/report.png of a run's report: `python docs/make_gallery.py RUN [RUN ...]`. Needs Chromium and its driver.

Left as on a desk, in light; right as on a phone, in dark.
"""

import argparse
import base64
import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from notus.evaluation.read_run import read_runs
from notus.evaluation.report.page import render

HEIGHT = 1560  # of what is shown of each page, in CSS pixels
VIEWS = ((1180, "light"), (390, "dark"))
FRAME = """<!doctype html>
<body style="margin:0;padding:28px;display:flex;gap:28px;background:#d9dee3;width:max-content">{}</body>"""
IMAGE = '<img src="data:image/png;base64,{}" style="border-radius:14px;box-shadow:0 6px 28px #1233" width="{}">'


def main() -> None:
    """Write the image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("report.png"))
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as folder:
        page, frame = Path(folder) / "report.html", Path(folder) / "frame.html"
        page.write_text(render(read_runs(args.runs)), encoding="utf-8")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            images = [IMAGE.format(shoot(browser, page, width, HEIGHT, scheme), width) for width, scheme in VIEWS]
            frame.write_text(FRAME.format("".join(images)), encoding="utf-8")
            width = sum(width for width, _ in VIEWS) + 28 * (len(VIEWS) + 1)
            image = shoot(browser, frame, width, HEIGHT + 2 * 28, "light")
        finally:
            browser.quit()
    args.output.write_bytes(base64.b64decode(image))
    print(f"{args.output}: {args.output.stat().st_size / 1024:.0f} KiB")


def shoot(browser: webdriver.Chrome, page: Path, width: int, height: int, scheme: str) -> str:
    """The top of a page as PNG, in base64."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    # two frames on, all of it is drawn
    browser.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")
    return str(browser.get_screenshot_as_base64())


if __name__ == "__main__":
    main()
