"""A real headless Chromium, a synthetic atlas on disk, and a page that remembers what went wrong.

Skipped visibly where Chromium or its driver is not installed (`apt-get install chromium
chromium-driver`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.browser import synthetic

AXE = (
    Path(__file__).parents[2]
    / "pipeline"
    / "site"
    / "app"
    / "node_modules"
    / "axe-core"
    / "axe.min.js"
)


SMALL = synthetic.Sizes(n_layers=6, n_latents=300, n_documents=12, rows_per_shard=500)


@pytest.fixture(scope="session")
def sizes() -> Any:
    return SMALL


@pytest.fixture(scope="session")
def atlas_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_atlas(tmp_path_factory.mktemp("atlas"), SMALL).parent


@pytest.fixture(scope="session")
def world() -> ModuleType:
    """The generator itself: its containers and texts are the oracle of what pages show."""
    return synthetic


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    service = shutil.which("chromedriver")
    if chromium is None or service is None:
        pytest.skip("no Chromium with its driver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-sync")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(service))
    downloads = tmp_path_factory.mktemp("downloads")
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)}
    )
    browser.downloads = downloads
    yield browser
    browser.quit()


class Page:
    """One atlas in the browser."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def load(self, route: str = "", *, width: int = 1440, dark: bool = False) -> None:
        """Open the folder anew at a route."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(f"{(self.folder / 'index.html').as_uri()}#/{route}")
        self.wait(
            "return document.querySelector('main')?.dataset.shown || "
            "document.querySelector('.error')"
        )
        self.settle()

    def go(self, route: str) -> None:
        """Change the address and wait for the view."""
        before = self.js("return document.querySelector('main').dataset.shown")
        self.js(
            "if (location.hash === arguments[0]) dispatchEvent(new "
            "HashChangeEvent('hashchange')); "
            "else location.hash = arguments[0]",
            f"#/{route}",
        )
        self.wait("return document.querySelector('main').dataset.shown !== arguments[0]", before)
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is being read and two looks at the document agree."""
        self.wait("return !document.querySelector('.progress span')")
        last = None
        for _ in range(60):
            size = self.js("return document.documentElement.outerHTML.length")
            if size == last:
                return
            last = size
            time.sleep(0.06)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(script, *arguments)
            if value:
                return value
            time.sleep(0.03)
        raise AssertionError(f"never true: {script}\n{self.text()[:2000]}")

    def click(self, selector: str) -> None:
        self.wait("return document.querySelector(arguments[0])", selector)
        self.js("document.querySelector(arguments[0]).click()", selector)
        self.settle()

    def text(self, selector: str = "body") -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)",
            selector,
        )

    def complaints(self) -> list[str]:
        """Everything the console said since `load`."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address asked for since `load`, and every request that failed."""
        seen = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                seen.append(message["params"]["request"]["url"])
            if message["method"] == "Network.loadingFailed" and not message["params"].get(
                "canceled"
            ):
                seen.append(f"failed: {message['params']['errorText']}")
        return seen

    def download(self, press: Callable[[], None]) -> Path:
        """The file that pressing something saves."""
        before = set(self.driver.downloads.iterdir())
        press()
        for _ in range(200):
            new = [
                p
                for p in set(self.driver.downloads.iterdir()) - before
                if p.suffix != ".crdownload"
            ]
            if new and new[0].stat().st_size:
                return new[0]
            time.sleep(0.03)
        raise AssertionError("nothing was saved")


@pytest.fixture
def page(driver: Any, atlas_folder: Path) -> Iterator[Page]:
    page = Page(driver, atlas_folder)
    yield page
    page.js("localStorage.clear()")


@pytest.fixture
def page_of(driver: Any) -> Callable[[Path], Page]:
    return lambda folder: Page(driver, folder)


@pytest.fixture(scope="session")
def axe() -> str:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: run `npm ci` in pipeline/site/app")
    return AXE.read_text()
