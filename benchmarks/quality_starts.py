"""Independent, shared and chained starts over adjacent layers: quality, cost, and how well the
layers line up.

    python -m benchmarks.quality_starts --collect ARTIFACT --out FOLDER [--layers 12 13 14 15 16 17]
    [--seeds 0 1 2] …

For each start: the train stage, the evaluation lenses with the model at every layer, the link
stage. Independent and shared SAEs train one pass over the rows (or `--steps`), so does the first of
a chain; the others of a chain `--next-steps`. Prints one JSON line per start and seed, and one per
start (mean over seeds, lowest and highest): FVU, CE recovered, dead latents, processor seconds of
training (all cores added up), links above the null at a 5 % false-discovery rate, and the Pearson
correlation of linked pairs on held-out tokens. What is made already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from benchmarks.__main__ import head
from benchmarks.measured import measured
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.run import Run
from pipeline.stages import collect, link, train
from pipeline.training.plan import Chain, Independent, Initialisation, Shared
from sae.architectures import TopK

STARTS: dict[str, type[Initialisation]] = {
    "independent": Independent,
    "shared": Shared,
    "chain": Chain,
}
QUALITY = ("fvu", "l0", "dead_fraction", "ce_recovered_zero", "ce_recovered_mean", "pca_fvu")
LINKS = ("residual_linked_share", "residual_cosine_median", "residual_null_p99")
LINKS += ("residual_pearson_median", "residual_pearson_best_median", "residual_agreement")


def main(arguments: argparse.Namespace) -> None:
    collected = Artifact.open(arguments.collect, kind=collect.KIND, schema=collect.SCHEMA)
    store = Run.of({"collect": collected}).store
    n_rows = len(
        store.kept_rows("train", sites=[parse_site(f"L{layer}") for layer in arguments.layers])
    )
    arguments.steps = arguments.steps or n_rows // arguments.batch_size
    print(json.dumps(head() | {"n_train_rows": n_rows, "threads": arguments.threads}), flush=True)
    records = []
    for seed in arguments.seeds:
        for name in arguments.starts:
            rows, linked, trained = made(arguments, collected, name, seed)
            records.append(record(arguments, name, seed, trained, rows, linked))
            print(json.dumps(records[-1]), flush=True)
    for line in means(records):
        print(json.dumps(line), flush=True)


def made(
    arguments: argparse.Namespace, collected: Artifact, start: str, seed: int
) -> tuple[pd.DataFrame, Artifact, Artifact]:
    """What a start gave: evaluation, links, dictionaries."""
    folder = arguments.out / f"{start}-seed{seed}"
    trained = stage(
        arguments, train, train_config(arguments, start, seed), folder, collect=collected
    )
    sites = tuple(f"L{layer}" for layer in arguments.layers)
    rows = measured(
        collected,
        trained,
        folder,
        n_tokens=arguments.eval_tokens,
        ce_tokens=arguments.ce_tokens,
        ce_sites=sites,
        context=RunContext(n_threads=arguments.threads),
    )
    return (
        rows,
        stage(arguments, link, link.Config(), folder, collect=collected, train=trained),
        trained,
    )


def stage(
    arguments: argparse.Namespace, module: ModuleType, config: Any, folder: Path, **inputs: Artifact
) -> Artifact:
    """The stage's artifact in `folder`: found, where it was made with this config, or made."""
    out = folder / module.KIND
    wanted = json.loads(config.model_dump_json())
    if (out / "manifest.json").is_file():
        artifact = Artifact.open(out, kind=module.KIND, schema=module.SCHEMA)
        if all(artifact.config.get(name, value) == value for name, value in wanted.items()):
            return artifact
    whole, started = not out.with_name(f"{out.name}.partial").exists(), time.process_time()
    artifact = module.run(
        config, module.Inputs(**inputs), out, RunContext(n_threads=arguments.threads)
    )
    if whole:
        (folder / f"{module.KIND}_seconds.txt").write_text(f"{time.process_time() - started:.1f}")
    return artifact


def train_config(arguments: argparse.Namespace, start: str, seed: int) -> train.Config:
    initialisation = Chain(next_steps=arguments.next_steps) if start == "chain" else STARTS[start]()
    return train.Config(
        architecture=TopK(k=arguments.k),
        n_latents=arguments.n_latents,
        sites=tuple(f"L{layer}" for layer in arguments.layers),
        initialisation=initialisation,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=seed,
    )


def record(
    arguments: argparse.Namespace,
    start: str,
    seed: int,
    trained: Artifact,
    rows: pd.DataFrame,
    linked: Artifact,
) -> dict[str, Any]:
    seconds = (
        trained.path.parent / "train_seconds.txt"
    )  # not there when the training was stopped and resumed
    n_steps = sum(
        json.loads(file.read_text(encoding="utf-8"))["metadata"]["steps"]
        for file in trained.path.glob("dictionaries/*/sae.json")
    )
    return {
        "start": start,
        "seed": seed,
        "layers": f"{arguments.layers[0]}–{arguments.layers[-1]}",
        "steps_altogether": n_steps,
        "train_seconds": float(seconds.read_text()) if seconds.exists() else None,
        **{
            name: None if rows[name].isna().all() else round(float(rows[name].mean()), 5)
            for name in QUALITY
        },
        **{name.removeprefix("residual_"): linked.summary[name] for name in LINKS},
    }


def means(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a start: means over seeds, and the range of what is compared."""
    lines = []
    for start, part in pd.DataFrame(records).groupby("start", sort=False):
        numbers = part.drop(columns=["start", "seed", "layers"]).astype(float)
        compared = ("fvu", "ce_recovered_zero", "linked_share", "pearson_median")
        spread = {
            f"{name}_seeds": [float(numbers[name].min()), float(numbers[name].max())]
            for name in compared
        }
        mean = {
            name: None if pd.isna(value) else round(float(value), 5)
            for name, value in numbers.mean().items()
        }
        lines.append({"start": start, "seeds": len(part), **mean, **spread})
    return lines


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--collect",
        type=Path,
        required=True,
        help="a collect artifact with the layers' residual sites",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 13, 14, 15, 16, 17])
    parser.add_argument("--starts", choices=tuple(STARTS), nargs="+", default=list(STARTS))
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=0, help="0 for one pass over the rows")
    parser.add_argument("--next-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--ce-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parsed(sys.argv[1:]))
