"""Tables keep what they are given, whole where nobody reads them on a terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.console import table


def test_columns_are_aligned_and_nothing_is_cut_or_taken_for_markup() -> None:
    long = "a label that is longer than any terminal is wide, " * 10
    rows = [("L0/1", "0.5", "[bold] :smile: " + long), ("L12.mlp/402", "12", "")]
    assert table(rows) == ["L0/1         0.5  [bold] :smile: " + long.rstrip(), "L12.mlp/402  12"]
    assert table([("a", "b")], header=("first", "x")) == ["first  x", "a      b"]
    assert table([]) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_every_console_shows_every_text(encoding: str) -> None:
    """Signs that an encoding lacks are written in plain letters; half a character as its number."""
    lines = [
        "from pipeline.console import say, use_any_console",
        "use_any_console()",
        r"say('k \u2265 1 \u2192 caf\xe9 \u65e5 \ud83d')",
    ]
    found = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr
    plain = {
        "cp1252": "k >= 1 -> café \\u65e5 \\ud83d",
        "ascii": "k >= 1 -> caf\\xe9 \\u65e5 \\ud83d",
        "utf-8": "k ≥ 1 → café 日 \\ud83d",
    }[encoding]
    assert found.stdout.decode(encoding).strip() == plain


def test_the_help_of_a_stage_is_printed_on_a_console_without_its_signs() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", "train", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert found.returncode == 0, found.stderr
    assert "--train.seed  <int >= 0 < 2147483648>" in found.stdout.decode("cp1252")


def test_the_list_of_commands_needs_no_torch() -> None:
    lines = ["import sys", "from pipeline.cli import run_command", "run_command(['--help'])"]
    lines += ["sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"]
    found = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True)
    assert found.returncode == 0
    assert b"Usage: featureflow" in found.stdout
