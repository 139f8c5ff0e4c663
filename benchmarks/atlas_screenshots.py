"""Pictures of an atlas' pages for the documentation: a site folder and a feature ->
docs/images/atlas-*.png.

    python -m benchmarks.atlas_screenshots artifacts/laptop/atlas/site --feature L12/402

Needs Chromium with its driver. Each page is taken at 1440 and at 390 pixels. Cost: seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.atlas_pages import open_browser

_SETTLED = (
    "return document.querySelector('main')?.dataset.shown && !document.querySelector('.progress "
    "span') "
    "&& !document.querySelector('.examples > .example:not(:has(.example-text)), [data-waiting]')"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("--feature", required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    options = parser.parse_args()
    pages = {"overview": "", "flow": "flow", "trunks": "trunks", "card": options.feature}
    pages["graph"] = f"graph/{options.feature}?b=4&f=4"
    options.out.mkdir(parents=True, exist_ok=True)
    driver = open_browser()
    try:
        for width in (1440, 390):
            for name, route in pages.items():
                driver.get("about:blank")
                take(driver, f"{options.site.resolve().as_uri()}/index.html#/{route}", width)
                driver.save_screenshot(str(options.out / f"atlas-{name}-{width}.png"))
    finally:
        driver.quit()


def take(driver: Any, address: str, width: int) -> None:
    """Open a page and make the window as high as the page, at most 1800 pixels."""
    resize(driver, width, 900)
    driver.get(address)
    end = time.monotonic() + 30
    while not driver.execute_script(_SETTLED) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    resize(
        driver,
        width,
        min(1800, driver.execute_script("return document.documentElement.scrollHeight")),
    )
    time.sleep(0.3)


def resize(driver: Any, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


if __name__ == "__main__":
    main()
