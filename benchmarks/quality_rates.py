"""Which learning rate suits each trainer? The rate of `quality_peers` is chosen with this, for
every trainer alike.

    python -m benchmarks.quality_rates --collect ARTIFACT --peers FOLDER --out FOLDER [--rates …]
    [--save-best FILE]

Every trainer (ours, SAELens, dictionary_learning) trains one dictionary per rate, with a seed that
the comparison does not use (9), on the rows, width, L0 and budget of `quality_peers`; the lens
`reconstruction` measures all of them on held-out rows. Prints one JSON line per dictionary and one
per trainer with its best rate. `--save-best` writes them as `quality_peers --learning-rate` takes
them: `featureflow=… saelens=… dictionary_learning=…`. What is made already is not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from benchmarks import quality_peers
from benchmarks.__main__ import head
from benchmarks.measured import measured
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.run import Run
from pipeline.stages import collect, train

RATES = (3.4e-3, 4.8e-3, 6.8e-3)  # below, every trainer did worse (docs/history/training.md)
SEED = 9


def main(arguments: argparse.Namespace, rates: list[float], save_best: Path | None) -> None:
    collected = Artifact.open(arguments.collect, kind=collect.KIND, schema=collect.SCHEMA)
    rows = arguments.out / "rows.npy"
    n_train, n_held_out = quality_peers.export_rows(
        Run.of({"collect": collected}).store, parse_site(arguments.site), rows
    )
    arguments.steps = arguments.steps or n_train // arguments.batch_size
    arguments.out = arguments.out / "rates"
    for rate in rates:
        for trainer in quality_peers.rate_of_each(arguments):
            run = quality_peers.Run(
                trainer=trainer, label=f"{rate:g}", seed=SEED, learning_rate=rate
            )
            quality_peers.train_one(arguments, run, collected, rows, n_held_out)
    if arguments.train_only:
        return
    print(
        json.dumps(
            head()
            | {"n_train_rows": n_train, "n_held_out_rows": n_held_out, "steps": arguments.steps}
        )
    )
    first = Artifact.open(
        arguments.out / "train" / f"{rates[0]:g}", kind=train.KIND, schema=train.SCHEMA
    )
    others = (str(arguments.out / "dictionaries"),)
    best = report(
        measured(collected, first, arguments.out, n_tokens=arguments.eval_tokens, others=others)
    )
    if save_best is not None:
        save_best.write_text(
            " ".join(f"{trainer}={rate:g}" for trainer, rate in best.items()), encoding="utf-8"
        )


def report(rows: pd.DataFrame) -> dict[str, float]:
    """Print what every rate gave; the best rate of each trainer."""
    chosen = {}
    measured = rows[rows["source"].str.startswith("dictionaries/")].copy()
    parts = measured["source"].str.split("/")
    measured["trainer"], measured["rate"] = parts.str[1], parts.str[2].astype(float)
    for trainer, part in measured.sort_values("rate").groupby("trainer"):
        for row in part.itertuples():
            line = {
                "trainer": trainer,
                "learning_rate": row.rate,
                "fvu": row.fvu,
                "dead_fraction": row.dead_fraction,
            }
            print(json.dumps(line), flush=True)
        best = part.loc[part["fvu"].idxmin()]
        chosen[str(trainer)] = float(best["rate"])
        print(
            json.dumps(
                {"trainer": trainer, "best_learning_rate": best["rate"], "fvu": best["fvu"]}
            ),
            flush=True,
        )
    return chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--save-best", type=Path)
    own, rest = parser.parse_known_args(sys.argv[1:])
    main(quality_peers.parsed([*rest, "--seeds", str(SEED)]), own.rates, own.save_best)
