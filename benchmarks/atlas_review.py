"""Look at an atlas as a reader would: a seeded choice of cards as pictures and texts, and axe on
its pages.

    python -m benchmarks.atlas_review artifacts/laptop/atlas/site --out /tmp/review --seed 0

1. draw `--n` features that fire, evenly over the dictionaries, from a seed;
2. open each card in headless Chromium from disk; keep a picture and the page's own text;
3. run axe on every kind of page, light and dark, at 1440 and 390 pixels; one JSON line per page
   with its violations.

Needs Chromium with its driver, and `npm ci` in pipeline/site/app for axe. Cost: about a second a
page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.atlas_pages import open_browser
from benchmarks.atlas_screenshots import take
from pipeline.site.shards import read_shard

AXE = (
    Path(__file__).parents[1]
    / "pipeline"
    / "site"
    / "app"
    / "node_modules"
    / "axe-core"
    / "axe.min.js"
)
_ALIVE = 1
_RUN = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ['violations']})
  .then((found) => done(found.violations), (error) => done([{id: String(error), nodes: []}]));
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    features = chosen_features(options.site, options.n, options.seed)
    driver = open_browser()
    try:
        for number, feature in enumerate(features):
            keep_card(
                driver,
                options.site,
                feature,
                options.out / f"{number:02d}-{feature.replace('/', '-')}",
            )
            print(json.dumps({"card": feature}), flush=True)
        for line in axe_lines(driver, options.site, features[0]):
            print(json.dumps(line), flush=True)
    finally:
        driver.quit()


def chosen_features(site: Path, n: int, seed: int) -> list[str]:
    """Features that fire: dictionaries spread evenly over the model, latents uniformly in each."""
    generator = np.random.default_rng(seed)
    shorts = [s["short"] for s in read_shard(site, "manifest").json["sites"]]
    chosen = []
    for place in np.linspace(0, len(shorts) - 1, n).round().astype(int):
        alive = np.flatnonzero(
            read_shard(site, f"sites/{shorts[place]}/overview").columns["flags"] & _ALIVE
        )
        chosen.append(f"{shorts[place]}/{int(generator.choice(alive))}")
    return chosen


def keep_card(driver: Any, site: Path, feature: str, out: Path) -> None:
    """Picture and text of one card."""
    driver.get("about:blank")
    take(driver, address(site, feature), 1440)
    driver.save_screenshot(f"{out}.png")
    text = driver.execute_script("return document.querySelector('main').innerText")
    Path(f"{out}.txt").write_text(text, encoding="utf-8", errors="replace")


def axe_lines(driver: Any, site: Path, feature: str) -> Iterator[dict[str, Any]]:
    """What axe finds on every kind of page."""
    script = AXE.read_text(encoding="utf-8")
    short = feature.split("/")[0]
    routes = (
        "",
        "flow",
        "trunks",
        "search?q=water",
        "notes",
        f"site/{short}",
        feature,
        f"graph/{feature}?b=3&f=3",
    )
    for width in (1440, 390):
        for theme in ("light", "dark"):
            preference = {"name": "prefers-color-scheme", "value": theme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
            for route in routes:
                driver.get("about:blank")
                take(driver, address(site, route), width)
                driver.execute_script(script)
                found = driver.execute_async_script(_RUN)
                violations = [f"{v['id']} ({len(v['nodes'])}): {_where(v)}" for v in found]
                yield {
                    "page": route or "overview",
                    "width": width,
                    "theme": theme,
                    "violations": violations,
                }


def address(site: Path, route: str) -> str:
    return f"{(site / 'index.html').resolve().as_uri()}#/{route}"


def _where(violation: dict[str, Any]) -> str:
    return " | ".join(" ".join(map(str, node["target"])) for node in violation["nodes"][:3])


if __name__ == "__main__":
    main()
