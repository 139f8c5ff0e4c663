"""The front door opens from any folder, costs nothing until it is used, and says what stands in its
way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import featureflow as ff
from data.store import ActivationStore
from pipeline.run import Run
from steering.plan import Plan

ROOT = Path(ff.__file__).parents[1]


def run_script(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *options, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_public_name_is_the_one_of_its_home() -> None:
    assert 20 <= len(ff.__all__) <= 32
    for name in ff.__all__:
        assert getattr(ff, name).__name__ == name
    assert (ff.Run, ff.Plan, ff.ActivationStore) == (Run, Plan, ActivationStore)
    with pytest.raises(AttributeError, match="no attribute 'Workshop'"):
        _ = ff.Workshop


def test_the_import_is_quiet_and_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = "torch transformers numpy pandas matplotlib scipy pydantic"
    done = run_script(
        tmp_path,
        f"import sys, featureflow as ff\nprint([m for m in {heavy.split()} if m in sys.modules])",
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["data", "sae", "steering", "pipeline"])
def test_a_plain_folder_of_the_same_name_beside_the_script_is_no_harm(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "rows.csv").write_text("1\n")
    done = run_script(tmp_path, f"import featureflow as ff, {name}\nprint({name}.__file__)")
    assert done.stderr == ""
    assert done.stdout.strip() == str(ROOT / name / "__init__.py")


@pytest.mark.parametrize("foreign", ["data/__init__.py", "steering.py"])
def test_a_real_package_of_the_same_name_is_named_with_what_helps(
    tmp_path: Path, foreign: str
) -> None:
    place = tmp_path / foreign
    place.parent.mkdir(exist_ok=True)
    place.write_text("")
    done = run_script(tmp_path, "import featureflow")
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert f"found:    {place}" in done.stderr
    assert "python -P" in done.stderr
    assert run_script(tmp_path, "import featureflow", "-P").returncode == 0
