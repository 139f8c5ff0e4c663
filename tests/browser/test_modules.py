"""The app's pure modules under Node, and the built files: in step with their sources, small,
without foreign addresses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "pipeline" / "site" / "app"
BUDGET = 175_000


def test_modules_agree_with_slow_references() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node here")
    files = sorted(str(path) for path in Path(__file__).parent.glob("unit/*.test.mjs"))
    done = subprocess.run(
        [node, "--test", *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_the_built_app_is_in_step_with_its_sources(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (SITE / "node_modules" / "esbuild").is_dir():
        pytest.skip("esbuild is not installed: run `npm ci` in pipeline/site/app")
    for name in ("src", "build.mjs", "package.json"):
        source = SITE / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "node_modules").symlink_to(SITE / "node_modules")
    subprocess.run([node, "build.mjs"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    for name in ("app.js", "app.css", "index.html"):
        assert (tmp_path / "dist" / name).read_bytes() == (SITE / "dist" / name).read_bytes(), (
            f"{name}: npm run build"
        )


def test_the_built_app_is_small_classic_and_closed() -> None:
    script = (SITE / "dist" / "app.js").read_text()
    page = (SITE / "dist" / "index.html").read_text()
    assert len(script.encode()) <= BUDGET
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\bimport\(",
        script,
    )
    addresses = set(
        re.findall(r"https?://[^\"'`\s)]+", script + page + (SITE / "dist" / "app.css").read_text())
    )
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert 'type="module"' not in page


def test_the_lockfile_names_no_host() -> None:
    assert "://" not in (SITE / "package-lock.json").read_text()
