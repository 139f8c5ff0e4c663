"""How fast the atlas' pages open: a synthetic atlas in headless Chromium, from disk.

1. write a synthetic site of the wanted size (tests/browser/synthetic; links, labels and cards of
   every feature);
2. open it, then cards, dictionaries, flow graphs and searches; each time runs from the change of
   address to the frame after everything is drawn, examples included;
3. print JSON lines: a page's milliseconds as median, 95th percentile and largest, by the clock, and
   its thread's median; the folder's size;
4. with `--site`, the same on a real atlas. A card of a feature that never fired has no examples to
   wait for. Files are in the system's cache, as after any first visit.

Needs Chromium with its driver. Cost: a few minutes and about 0.7 GB of disk for 30 x 16,384, mostly
writing.

    python -m benchmarks.atlas_pages --layers 30 --latents 16384 --site artifacts/laptop/atlas/site
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.__main__ import head
from pipeline.site.shards import read_shard
from tests.browser import synthetic

_DRAWN = """
const [hash, ready, done] = arguments;
const started = performance.now();
location.hash = hash;
const test = new Function(`return ${ready}`);
const look = () => (document.querySelector('main').dataset.shown !== before && test())
  ? requestAnimationFrame(() => done(performance.now() - started)) : setTimeout(look, 1);
const before = document.querySelector('main').dataset.shown;
look();
"""
_NODE = "!!document.querySelector('.node')"
_FOUND = "/labels? match/.test(document.querySelector('main').innerText)"
GOALS_MS = {"index": 2000, "card": 200}
_WORDS = ("harbour", "silver river", "chess")
_CARD = "!document.querySelector('.examples > .example:not(:has(.example-text))')"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--latents", type=int, default=16_384)
    parser.add_argument("--cards", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="keep the synthetic site here and use it again")
    parser.add_argument(
        "--site", type=Path, help="afterwards the same on a real atlas: its folder `site`"
    )
    options = parser.parse_args()
    print(json.dumps(head()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "site"
        if not (folder / "manifest.js").is_file():
            sizes = {"n_layers": options.layers, "n_latents": options.latents, "module_every": 1000}
            synthetic.write_atlas(folder, synthetic.Sizes(**sizes, full_cards=False))
        report("synthetic", folder, options.layers, options.latents, options.cards)
    if options.site:
        sites = read_shard(options.site, "manifest").json["sites"]
        sites = [site for site in sites if site["kind"] == "resid_post"]
        report(
            "real",
            options.site.resolve(),
            len(sites),
            min(s["n_latents"] for s in sites),
            options.cards,
        )


def report(name: str, folder: Path, layers: int, latents: int, n_cards: int) -> None:
    """A line for the folder, then one for each kind of page."""
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    facts = {"atlas": name, "layers": layers, "latents": latents}
    sizes = {"folder_mb": round(sum(files) / 1e6, 1), "files": len(files)}
    driver = open_browser()
    try:
        browser = driver.capabilities["browserVersion"]
        print(
            json.dumps(
                {**facts, **sizes, "browser": browser, "load": round(os.getloadavg()[0], 2)}
            ),
            flush=True,
        )
        for page, times in measure(driver, folder, layers, latents, n_cards).items():
            line = {
                "atlas": name,
                "page": page,
                **spread(times),
                "goal_ms": GOALS_MS.get(page.split(",")[0]),
            }
            print(json.dumps(line), flush=True)
    finally:
        driver.quit()


def measure(
    driver: Any, folder: Path, layers: int, latents: int, n_cards: int
) -> dict[str, list[tuple[float, float]]]:
    """Times of a site whose residual dictionaries are L0, L1, …, of at least `latents` latents."""
    opened = [open_index(driver, folder) for _ in range(9)]
    # every card in another shard, which is read from disk
    cards = [f"L{(7 * i) % layers}/{(257 * i + 3) % (latents - 1)}" for i in range(n_cards)]
    middle = layers // 2
    return {
        "index": opened,
        "card, first visit of its shard": [draw(driver, f"#/{card}", _CARD) for card in cards],
        "card, again": [draw(driver, f"#/{card}", _CARD) for card in cards[-16:-1]],
        "dictionary": [draw(driver, f"#/site/L{layer}") for layer in range(0, layers, 5)],
        "flow graph": [draw(driver, f"#/graph/L{middle}/{i}", _NODE) for i in range(12)],
        "search of all labels": [draw(driver, f"#/search?q={word}", _FOUND) for word in _WORDS],
    }


def open_browser() -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    flags = (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-sync",
    )
    for flag in (*flags, "disable-ipc-flooding-protection"):  # more than 200 pages in 10 s
        options.add_argument(f"--{flag}")
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )


def open_index(driver: Any, folder: Path) -> tuple[float, float]:
    """Milliseconds from the start of navigation until the overview is drawn: by the clock, and of
    the page's thread."""
    driver.get("about:blank")
    driver.execute_cdp_cmd("Performance.disable", {})
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    before = task_seconds(driver)
    driver.get((folder / "index.html").as_uri())
    script = "return document.querySelector('.strip-column') ? performance.now() : null"
    while (drawn := driver.execute_script(script)) is None:
        time.sleep(0.005)
    return float(drawn), 1000 * (task_seconds(driver) - before)


def draw(driver: Any, address: str, ready: str = "true") -> tuple[float, float]:
    """Milliseconds from the change of address to the frame in which the page stands: by the clock,
    and of processor time on the page's thread (which a busy machine does not stretch)."""
    before = task_seconds(driver)
    wall = float(driver.execute_async_script(_DRAWN, address, ready))
    return wall, 1000 * (task_seconds(driver) - before)


def task_seconds(driver: Any) -> float:
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(item["value"] for item in metrics if item["name"] == "TaskDuration"))


def spread(values: list[tuple[float, float]]) -> dict[str, float]:
    wall, thread = zip(*values, strict=True)
    return {
        "median_ms": round(statistics.median(wall), 1),
        "p95_ms": round(sorted(wall)[math.ceil(0.95 * len(wall)) - 1], 1),
        "max_ms": round(max(wall), 1),
        "thread_median_ms": round(statistics.median(thread), 1),
        "n": len(values),
    }


if __name__ == "__main__":
    main()
