"""Run the benchmarks that need no other tool's environment and write `docs/benchmarks.md` from all
recorded results.

    python -m benchmarks                 run them all, then write the page
    python -m benchmarks store_write     run some
    python -m benchmarks --report        only write the page

Each benchmark is a program of its own that prints JSON lines, kept in
`benchmarks/results/<name>.jsonl`, one run replacing the last. A quiet machine is needed for numbers
worth keeping; the load is recorded with them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "benchmarks.md"
COMMANDS: dict[str, list[str]] = {
    "store_write": ["-m", "benchmarks.store_write"],
    "store_read": ["-m", "benchmarks.store_read"],
    "store_collection": ["-m", "benchmarks.store_collection"],
    "link_rate": ["benchmarks/link_speed.py", "rate", "--n", "16384", "--d", "576"],
    "atlas_generation": ["benchmarks/atlas_generation.py"],
    "steering_speed": ["-m", "benchmarks.steering_speed"],
    "stage_limits": ["-m", "benchmarks.stage_limits"],
}
ELSEWHERE = {
    "store_saelens": "python -m benchmarks.store_saelens --peers <folder> --layers 5 14 23 29 "
    "--contexts 32 --pairs 3",
    "store_shuffle": "python -m benchmarks.store_shuffle --store "
    "artifacts/laptop/collect/store.zarr",
    "train_speed": "make bench-train PEERS=<folder>",
    "quality_peers": "make bench-quality PEERS=<folder>",
    "quality_rates": "make bench-quality PEERS=<folder>",
    "quality_starts": "make bench-quality PEERS=<folder>",
    "link_graph": "python benchmarks/link_speed.py graph --layers 30 --n 16384",
    "atlas_pages": "python -m benchmarks.atlas_pages --layers 30 --latents 16384 --site "
    "artifacts/laptop/atlas/site",
    "atlas_peer": "python -m benchmarks.atlas_peer --artifacts artifacts/laptop --peers <folder>",
    "atlas_sizes": "python -m benchmarks.atlas_sizes --artifacts artifacts/laptop --profile <name> "
    "--layers <n>",
}


def main() -> None:
    """Run what is named (all by default), then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--report", action="store_true", help="only write the page")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in COMMANDS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    RESULTS.mkdir(exist_ok=True)
    for name in () if options.report else options.names or COMMANDS:
        run(name)
    PAGE.write_text(report(), encoding="utf-8")
    print(PAGE.relative_to(ROOT.parent))


def run(name: str) -> None:
    """One benchmark, its lines shown as they come and kept when it ends well."""
    before = head()
    print(f"{name} (load {before['load_before']})", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, *COMMANDS[name]],
        cwd=ROOT.parent,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    lines = [json.dumps(before), *map(json.dumps, records)]
    (RESULTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for record in records:
        print("  " + json.dumps(record), flush=True)


def head() -> dict[str, object]:
    """The first line of a results file: when, on what machine, how busy."""
    load = round(os.getloadavg()[0], 1)
    return {"measured": date.today().isoformat(), "load_before": load, "machine": _machine()}


def report() -> str:
    """The page: one table a results file, columns as they come, nothing rounded away."""
    parts = [
        "# Benchmarks",
        "",
        "Generated from `benchmarks/results/*.jsonl` by `python -m benchmarks --report`; run them "
        "with `make bench`. "
        "Ratios are of runs that alternated on one machine; absolute times are of that machine "
        "only.",
    ]
    for path in sorted(RESULTS.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        first = records.pop(0) if records and "measured" in records[0] else {}
        command = (
            "python " + " ".join(COMMANDS[path.stem])
            if path.stem in COMMANDS
            else ELSEWHERE.get(path.stem, "")
        )
        facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in first.items())
        parts += [
            "",
            f"## {path.stem.replace('_', ' ')}",
            "",
            f"`{command}`" + (f" ({facts})" if facts else ""),
            "",
        ]
        parts += _tables(records)
    return "\n".join(parts) + "\n"


def _tables(records: list[dict]) -> list[str]:
    """Records with the same keys share a table."""
    lines: list[str] = []
    previous: list[str] = []
    for record in records:
        keys = list(record)
        if keys != previous:
            lines += [
                "",
                "| " + " | ".join(key.replace("_", " ") for key in keys) + " |",
                "|" + "---|" * len(keys),
            ]
            previous = keys
        lines.append("| " + " | ".join(_cell(value) for value in record.values()) + " |")
    return lines[1:] if lines else ["(no records)"]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " … ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|")


def _machine() -> str:
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python "
        f"{platform.python_version()}"
    )


if __name__ == "__main__":
    main()
