"""Independent, shared and chained starts over adjacent layers: quality, cost, and how well the layers line up.

    python -m benchmarks.quality_starts --collect ARTIFACT --out FOLDER [--layers 10 11 12 13 14 15] …

For each start: the train stage, the evaluate stage with the model at every layer, the link stage. Prints one JSON line
per start and seed: FVU, CE recovered, dead latents, seconds of training, links above the null, and the Pearson
correlation of linked pairs on held-out tokens. Chained dictionaries train `--next-steps` steps, all others `--steps`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pandas as pd

from pipeline.artifact import Artifact
from pipeline.run import RunContext
from pipeline.stages import collect, evaluate, link, train
from pipeline.training.plan import Chain, Independent, Initialisation, Shared
from sae.architectures import TopK

STARTS: dict[str, type[Initialisation]] = {"independent": Independent, "shared": Shared, "chain": Chain}


def main(arguments: argparse.Namespace) -> None:
    collected = Artifact.open(arguments.collect, kind=collect.KIND, schema=collect.SCHEMA)
    context = RunContext(n_threads=arguments.threads)
    for seed in arguments.seeds:
        for name in arguments.starts:
            folder = arguments.out / f"{name}-seed{seed}"
            started = time.monotonic()
            trained = train.run(
                train_config(arguments, name, seed), train.Inputs(collect=collected), folder / "train", context
            )
            seconds = time.monotonic() - started
            sites = tuple(f"L{layer}" for layer in arguments.layers)
            settings = evaluate.Config(
                n_tokens=arguments.eval_tokens, ce_tokens=arguments.ce_tokens, ce_sites=sites, seed=0
            )
            inputs = evaluate.Inputs(collect=collected, train=trained)
            evaluated = evaluate.run(settings, inputs, folder / "evaluate", context)
            linked = link.run(link.Config(), link.Inputs(collect=collected, train=trained), folder / "link", context)
            print(json.dumps(record(name, seed, seconds, evaluated, linked)), flush=True)


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


def record(start: str, seed: int, seconds: float, evaluated: Artifact, linked: Artifact) -> dict[str, object]:
    rows = pd.read_parquet(evaluated.path / "metrics.parquet")
    numbers = ("fvu", "l0", "dead_fraction", "ce_recovered_zero", "ce_recovered_mean", "pca_fvu")
    return {
        "start": start,
        "seed": seed,
        "train_seconds": round(seconds, 1),
        **{name: None if rows[name].isna().all() else round(float(rows[name].mean()), 5) for name in numbers},
        **{f"link_{name}": value for name, value in linked.summary.items()},
    }


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--collect", type=Path, required=True, help="a collect artifact with the layers' residual sites"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 11, 12, 13, 14, 15])
    parser.add_argument("--starts", choices=tuple(STARTS), nargs="+", default=list(STARTS))
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--next-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--ce-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parsed(sys.argv[1:]))
