"""The same stored activations, width, L0 and token budget: what do SAELens, dictionary_learning and
we make of them?

    python -m benchmarks.quality_peers --collect ARTIFACT --peers FOLDER --out FOLDER [--site L15]
    [--n-latents 2048] …

1. Write the site's ordinary training rows, then its held-out rows, to one `.npy` file.
2. For every seed train ours (the train stage, independent start) and each peer (its own step in its
   own environment, benchmarks/peers), same rows, batch size and steps (one pass unless `--steps`
   says otherwise). The auxiliary loss is weighted by each trainer's own default; the learning rate
   is one for all (`--learning-rate 8e-4`) or each trainer's own, chosen by `quality_rates`
   (`--learning-rate featureflow=… saelens=… dictionary_learning=…`). What is made already is not
   made again, so a stopped run goes on; `--trainers saelens --seeds 1 --train-only` makes one of
   them.
3. Turn the peers' files into dictionaries over raw activations (they were given centred and scaled
   rows) and let the evaluation lenses measure all of them on the same held-out rows and contexts.

Prints one JSON line per dictionary, one per trainer (mean over seeds, lowest and highest), and one
per peer and number: ours minus theirs, with a 95 % interval over seeds (Welch). `OUT/lenses` has
the figures. Cost at 1 M tokens, d=576, N=2,048: about 10 minutes per peer run on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from benchmarks.__main__ import head
from benchmarks.measured import measured
from data.store import ActivationStore
from featureflow.sites import Site, parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.stages import collect, train
from pipeline.training.plan import Independent
from sae import Sae, save_sae
from sae.architectures import BatchTopK, TopK
from sae.formats import read

PEERS = {
    "topk": ("saelens", "sparsify", "dictionary_learning"),
    "batchtopk": ("saelens", "dictionary_learning"),
}
AUXILIARY = {
    "saelens": 1.0,
    "sparsify": 1 / 32,
    "dictionary_learning": 1 / 32,
}  # each trainer's own default
COMPARED = ("fvu", "ce_recovered_zero", "ce_recovered_mean", "dead_fraction")
SCRIPTS = Path(__file__).parent / "peers"
OURS = "featureflow"
DEFAULT_TRAINERS = [OURS, "saelens", "dictionary_learning"]
NUMBERS = (
    "fvu",
    "l0",
    "dead_fraction",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl_recovered_zero",
    "pca_fvu",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One dictionary to be made: by whom, under which name, from which seed and at which rate."""

    trainer: str
    label: str
    seed: int
    learning_rate: float


def main(arguments: argparse.Namespace) -> None:
    out, site = arguments.out, parse_site(arguments.site)
    collected = Artifact.open(arguments.collect, kind=collect.KIND, schema=collect.SCHEMA)
    rows = out / "rows.npy"
    n_train, n_held_out = export_rows(
        ActivationStore.open(collected.path / collect.STORE), site, rows
    )
    arguments.steps = arguments.steps or n_train // arguments.batch_size
    rates = rate_of_each(arguments)
    for seed in arguments.seeds:
        for trainer in rates:
            run = Run(trainer=trainer, label=f"seed{seed}", seed=seed, learning_rate=rates[trainer])
            train_one(arguments, run, collected, rows, n_held_out)
    if arguments.train_only:
        return
    about = {
        "n_train_rows": n_train,
        "n_held_out_rows": n_held_out,
        "steps": arguments.steps,
        "learning_rate": rates,
    }
    print(json.dumps(head() | about), flush=True)
    first = Artifact.open(
        out / "train" / f"seed{arguments.seeds[0]}", kind=train.KIND, schema=train.SCHEMA
    )
    report(
        measured(
            collected,
            first,
            out,
            n_tokens=arguments.eval_tokens,
            others=(str(out / "dictionaries"),),
            ce_tokens=arguments.ce_tokens,
            ce_sites=(site.short,),
        )
    )


def rate_of_each(arguments: argparse.Namespace) -> dict[str, float]:
    """The learning rate of every trainer whose environment is there."""
    there = [
        trainer
        for trainer in arguments.trainers
        if trainer == OURS
        or (
            trainer in PEERS[arguments.architecture]
            and (arguments.peers / trainer / "bin" / "python").is_file()
        )
    ]
    own = dict(text.split("=") for text in arguments.learning_rate if "=" in text)
    common = next((text for text in arguments.learning_rate if "=" not in text), "8e-4")
    return {trainer: float(own.get(trainer, common)) for trainer in there}


def train_one(
    arguments: argparse.Namespace, run: Run, collected: Artifact, rows: Path, n_held_out: int
) -> None:
    """The run's dictionary, unless it is there."""
    if (arguments.out / "dictionaries" / run.trainer / run.label / "sae.json").is_file():
        return
    if run.trainer == OURS:
        train_ours(arguments, run, collected)
    else:
        train_peer(arguments, run, rows, n_held_out)


def export_rows(store: ActivationStore, site: Site, file: Path) -> tuple[int, int]:
    """Training rows, then held-out rows, float32; returns how many of each."""
    parts = [store.kept_rows(split) for split in ("train", "validation")]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (sum(map(len, parts)), store.width(site))
        unfinished = file.with_suffix(f".{os.getpid()}")
        array = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
        filled = 0
        for rows in parts:
            for block in np.array_split(rows, max(1, len(rows) // 65536)):
                start = int(block[0])
                values = store.read(site, start, int(block[-1]) + 1)[block - start]
                array[filled : filled + len(block)] = values
                filled += len(block)
        array.flush()
        unfinished.rename(file)
    return len(parts[0]), len(parts[1])


def train_ours(arguments: argparse.Namespace, run: Run, collected: Artifact) -> None:
    site = parse_site(arguments.site)
    kind = TopK if arguments.architecture == "topk" else BatchTopK
    config = train.Config(
        architecture=kind(k=arguments.k),
        n_latents=arguments.n_latents,
        sites=(site.short,),
        initialisation=Independent(),
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=run.learning_rate,
        seed=run.seed,
    )
    place = arguments.out / "train" / run.label
    trained = train.run(
        config, train.Inputs(collect=collected), place, RunContext(n_threads=arguments.threads)
    )
    target = arguments.out / "dictionaries" / OURS / run.label
    shutil.copytree(trained.path / "dictionaries" / site.short, target, dirs_exist_ok=True)


def train_peer(arguments: argparse.Namespace, run: Run, rows: Path, n_held_out: int) -> None:
    """Train in the peer's environment, then save its dictionary over raw activations in our
    form."""
    raw = arguments.out / "peers" / run.trainer / run.label
    options = {
        "activations": rows,
        "architecture": arguments.architecture,
        "n-latents": arguments.n_latents,
        "k": arguments.k,
        "batch-size": arguments.batch_size,
        "steps": arguments.steps,
        "learning-rate": run.learning_rate,
        "aux-coefficient": AUXILIARY[run.trainer],
        "held-out": n_held_out,
        "threads": arguments.threads,
        "seed": run.seed,
        "save": raw,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    python = arguments.peers / run.trainer / "bin" / "python"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [str(python), str(SCRIPTS / f"train_{run.trainer}.py"), *flags],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{run.trainer} failed:\n{done.stderr[-3000:]}")
    print(json.dumps(json.loads(done.stdout.splitlines()[-1])), flush=True)
    with np.load(raw / "normalisation.npz") as normalisation:
        sae = over_raw_rows(
            read(raw), torch.from_numpy(normalisation["mean"]), float(normalisation["scale"])
        )
    sae.metadata.update(site=parse_site(arguments.site).name, architecture=arguments.architecture)
    save_sae(sae, arguments.out / "dictionaries" / run.trainer / run.label)


def over_raw_rows(sae: Sae, mean: torch.Tensor, scale: float) -> Sae:
    """The dictionary over x when `sae` is one over (x − mean) / scale; latents grow by `scale`."""
    from sae.formats.folding import Foreign, fold

    foreign = Foreign(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec + mean / scale,
        b_in=sae.b_in + mean / scale,
        activation=sae.activation,
        input_scale=1 / scale,
        output_scale=1 / scale,
        metadata=dict(sae.metadata),
    )
    return fold(foreign)


def report(rows: pd.DataFrame) -> None:
    measured = rows[rows["source"].str.startswith("dictionaries/")].copy()
    measured["trainer"] = measured["source"].str.split("/").str[1]
    for record in measured.to_dict(orient="records"):
        intervals = {
            name: [_rounded(record[f"{name}_{side}"]) for side in ("low", "high")]
            for name in ("fvu", "ce_recovered_zero", "ce_recovered_mean")
        }
        line = {"dictionary": record["source"], **_numbers(record)}
        print(
            json.dumps(line | {f"{name}_95": pair for name, pair in intervals.items()}), flush=True
        )
    for trainer, part in measured.groupby("trainer"):
        spread = {
            f"{name}_seeds": [_rounded(part[name].min()), _rounded(part[name].max())]
            for name in COMPARED
        }
        means = _numbers(part[list(NUMBERS)].mean().to_dict())
        print(json.dumps({"trainer": trainer, "seeds": len(part), **means, **spread}), flush=True)
    for trainer, part in measured.groupby("trainer"):
        for name in COMPARED if trainer != OURS else ():
            print(
                json.dumps(
                    difference(measured[measured["trainer"] == OURS][name], part[name], trainer)
                ),
                flush=True,
            )


def difference(ours: pd.Series, theirs: pd.Series, trainer: str) -> dict[str, Any]:
    """Ours minus theirs, with Welch's 95 % interval over seeds; `better` is none where it holds
    0."""
    mean = float(ours.mean() - theirs.mean())
    variances = ours.var() / len(ours), theirs.var() / len(theirs)
    if min(len(ours), len(theirs)) < 2 or sum(variances) == 0:
        return {"compared_with": trainer, "number": ours.name, "ours_minus_theirs": _rounded(mean)}
    freedom = sum(variances) ** 2 / sum(
        variance**2 / (len(part) - 1)
        for variance, part in zip(variances, (ours, theirs), strict=True)
    )
    half = float(stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5)
    lower_is_better = ours.name in ("fvu", "dead_fraction")
    who = None if abs(mean) <= half else OURS if (mean < 0) == lower_is_better else trainer
    return {
        "compared_with": trainer,
        "number": ours.name,
        "ours_minus_theirs": _rounded(mean),
        "interval_95": [_rounded(mean - half), _rounded(mean + half)],
        "better": who,
    }


def _numbers(record: dict[str, Any]) -> dict[str, float | None]:
    return {name: _rounded(record[name]) for name in NUMBERS}


def _rounded(value: Any) -> float | None:
    return None if pd.isna(value) else round(float(value), 5)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=Path, required=True, help="a collect artifact")
    parser.add_argument(
        "--peers", type=Path, required=True, help="folder made by peers/make_environments.sh"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--site", default="L15")
    parser.add_argument("--architecture", choices=tuple(PEERS), default="topk")
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=0, help="0 for one pass over the rows")
    parser.add_argument(
        "--learning-rate", nargs="+", default=["8e-4"], help="one for all, or TRAINER=RATE for each"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-tokens", type=int, default=49152)
    parser.add_argument("--ce-tokens", type=int, default=8192)
    parser.add_argument(
        "--trainers", nargs="+", default=DEFAULT_TRAINERS, choices=[OURS, *PEERS["topk"]]
    )
    parser.add_argument("--train-only", action="store_true", help="leave out the evaluation")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parsed(sys.argv[1:]))
