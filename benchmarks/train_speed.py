"""How long is a whole training step, ours and the peers', side by side on one machine?

    python -m benchmarks.train_speed --peers FOLDER --out FOLDER [--sizes 576x4096 768x12288]
    [--rounds 3] …

1. For every width d, rows to train on: `--activations` if it has that width, else synthetic ones
   (sparse combinations of 4 d directions plus noise), the same for everyone.
2. `--rounds` times, one after the other so that a busy spell hits all alike: ours in float32, ours
   with the bfloat16 encoder pass where the machine has it, and each peer in its own environment
   (`FOLDER/<peer>/bin/python`).
3. Every run goes to `OUT/runs.jsonl` as one JSON line. Printed is one line per size, architecture
   and contestant: the median over rounds of the median step, its spread, how many times faster than
   each peer in the same rounds (median and range), and the held-out FVU after the same steps on the
   same rows, so that a fast step at a worse loss shows.

A quiet machine is needed for numbers to be published: the load before is in the first line and in
every run. Cost with the defaults: about 8 minutes for d=576 and 14 for d=768, of which SAELens and
dictionary_learning are three quarters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.__main__ import head
from sae.kernels.select import has_fast_bfloat16

PEERS = {
    "topk": ("saelens", "sparsify", "dictionary_learning"),
    "batchtopk": ("saelens", "dictionary_learning"),
}
ROOT = Path(__file__).parent.parent


def main(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(arguments, name) for name in ("k", "batch_size", "steps", "rounds", "threads")
    }
    print(json.dumps(head() | settings), flush=True)
    for size in arguments.sizes:
        d, n_latents = map(int, size.split("x"))
        rows = activations_of_width(d, arguments)
        for architecture in arguments.architectures:
            records = []
            for number in range(arguments.rounds):
                for name, command in contestants(architecture, arguments):
                    record = timed(command, rows, architecture, n_latents, arguments)
                    records.append({"contestant": name, "round": number, **record})
                    with (arguments.out / "runs.jsonl").open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps({"size": size, **records[-1]}) + "\n")
            for line in summaries(records):
                print(json.dumps({"size": size, "architecture": architecture, **line}), flush=True)


def contestants(
    architecture: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, list[str]]]:
    """Who takes part, and how each is started."""
    ours = [sys.executable, "-m", "benchmarks.train_step_ours", "--precision"]
    yield "featureflow float32", [*ours, "float32"]
    if has_fast_bfloat16(arguments.device):
        yield "featureflow bfloat16", [*ours, "bfloat16"]
    for peer in PEERS[architecture]:
        python = arguments.peers / peer / "bin" / "python"
        if python.is_file():
            yield peer, [str(python), str(ROOT / "benchmarks" / "peers" / f"train_{peer}.py")]


def timed(
    command: Sequence[str],
    rows: Path,
    architecture: str,
    n_latents: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One run in a process of its own."""
    options = {
        "activations": rows,
        "architecture": architecture,
        "n-latents": n_latents,
        "k": arguments.k,
        "batch-size": arguments.batch_size,
        "steps": arguments.steps,
        "threads": arguments.threads,
        "device": arguments.device,
        "learning-rate": arguments.learning_rate,
        "lr-warmup-steps": max(1, arguments.steps // 5),
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    load = os.getloadavg()[0]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if done.returncode:
        return {"failed": done.stderr.strip()[-500:]}
    return {"load_before": round(load, 2), **json.loads(done.stdout.strip().splitlines()[-1])}


def summaries(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The medians over rounds, and how many times faster than each peer in the same rounds. A
    contestant that failed is named with what it said."""
    good = [record for record in records if "failed" not in record]
    for failed in {r["contestant"]: r for r in records if "failed" in r}.values():
        yield {"contestant": failed["contestant"], "failed": failed["failed"][-200:]}
    for name in dict.fromkeys(record["contestant"] for record in good):
        mine = {record["round"]: record for record in good if record["contestant"] == name}
        times = [record["step_ms_median"] for record in mine.values()]
        line = {
            "contestant": name,
            "step_ms": round(statistics.median(times), 1),
            "rounds_ms": [round(min(times), 1), round(max(times), 1)],
            "quartiles_ms": [
                round(statistics.median(r[f"step_ms_{quartile}"] for r in mine.values()), 1)
                for quartile in ("q25", "q75")
            ],
        }
        for peer in ("saelens", "sparsify", "dictionary_learning"):
            theirs = {
                record["round"]: record["step_ms_median"]
                for record in good
                if record["contestant"] == peer
            }
            ratios = [
                theirs[number] / mine[number]["step_ms_median"]
                for number in mine
                if number in theirs
            ]
            line[f"times_{peer}"] = round(statistics.median(ratios), 2) if ratios else None
            line[f"times_{peer}_range"] = (
                [round(min(ratios), 2), round(max(ratios), 2)] if ratios else None
            )
        yield line | {"fvu": round(statistics.median(record["fvu"] for record in mine.values()), 4)}


def activations_of_width(d: int, arguments: argparse.Namespace) -> Path:
    """The given rows where their width fits, else synthetic ones, made once."""
    if arguments.activations and np.load(arguments.activations, mmap_mode="r").shape[1] == d:
        return Path(arguments.activations)
    path = Path(arguments.out) / f"synthetic_{d}.npy"
    if not path.is_file():
        np.save(path, synthetic_rows(d, arguments.n_rows))
    return path


def synthetic_rows(d: int, n_rows: int) -> np.ndarray:
    """Each row: 40 of 4 d random unit directions, strengths exponential, plus noise of a tenth of
    the energy."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((4 * d, d), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = np.empty((n_rows, d), dtype=np.float32)
    for row in rows:
        chosen = generator.choice(4 * d, size=40, replace=False)
        row[:] = generator.exponential(size=40).astype(np.float32) @ directions[chosen]
    noise = generator.standard_normal((n_rows, d), dtype=np.float32)
    return rows + noise * np.float32(0.1**0.5 * rows.std())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--n-rows", type=int, default=40_000, help="rows of synthetic activations")
    parser.add_argument("--sizes", nargs="+", default=["576x4096", "768x12288"])
    parser.add_argument(
        "--architectures", nargs="+", default=["topk", "batchtopk"], choices=list(PEERS)
    )
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--device", default="cpu")
    main(parser.parse_args())
