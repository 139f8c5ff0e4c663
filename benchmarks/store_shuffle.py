"""What windowed shuffling costs in quality: dictionaries trained on windows of random blocks
against a full shuffle.

    python -m benchmarks.store_shuffle --store artifacts/laptop/collect/store.zarr [--site L14]
    [--steps 600]
                                       [--windows 65536 8192] [--seeds 0 1 2] [--n-latents 2048]
                                       [--batch 1024]

Every arm trains the same TopK dictionary from the same start on the same rows, as many batches;
only their order differs: a full shuffle of all rows, windows of the sizes given, and the order of
the text, which shows what there is to lose. One JSON line an arm: mean FVU on held-out documents
over the seeds, its range, and its ratio to the full shuffle's, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from benchmarks.__main__ import head
from data.store import ActivationStore
from featureflow.sites import parse_site
from sae.architectures import TopK
from sae.batches import Batch
from sae.normalisation import normalisation_of
from sae.schedule import learning_rate_law, schedule_of
from sae.trainer import Trainer, random_start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True)
    parser.add_argument("--site", default="L14")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--windows", type=int, nargs="+", default=[65_536, 8_192])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    options = parser.parse_args()
    store, site = ActivationStore.open(options.store), parse_site(options.site)
    held_out = torch.from_numpy(rows_of(store, site, store.kept_rows("validation")))
    train_rows = rows_of(store, site, store.kept_rows("train"))
    print(json.dumps(head()), flush=True)
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for name, batches in iter_arms(store, site, train_rows, options, seed):
            found.setdefault(name, []).append(
                fvu_after(batches, held_out, store, site, options, seed)
            )
            print(f"seed {seed}, {name}: FVU {found[name][-1]:.5f}", file=sys.stderr, flush=True)
    for name, values in found.items():
        ratios = [value / full for value, full in zip(values, found["full shuffle"], strict=True)]
        print(
            json.dumps(
                {
                    "order": name,
                    "fvu": round(statistics.mean(values), 5),
                    "fvu_seeds": [round(min(values), 5), round(max(values), 5)],
                    "ratio_to_full_shuffle": round(statistics.mean(ratios), 4),
                    "ratio_seeds": [round(min(ratios), 4), round(max(ratios), 4)],
                    "seeds": len(values),
                    "site": site.short,
                    "train_rows": len(train_rows),
                    "steps": options.steps,
                    "n_latents": options.n_latents,
                    "k": options.k,
                    "batch": options.batch,
                }
            ),
            flush=True,
        )


def rows_of(store: ActivationStore, site: object, rows: np.ndarray) -> np.ndarray:
    first, last = int(rows[0]), int(rows[-1]) + 1
    return store.read(str(site), first, last)[rows - first]


def iter_arms(
    store: ActivationStore, site: object, rows: np.ndarray, options: argparse.Namespace, seed: int
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    yield "full shuffle", permuted(rows, options.batch, seed)
    for window in options.windows:
        with store.batches(
            [site], batch_size=options.batch, seed=seed, window_rows=window
        ) as reader:
            yield f"windows of {window} rows", (batch[site] for batch in reader)
    yield "order of the text", in_order(rows, options.batch)


def permuted(rows: np.ndarray, batch_size: int, seed: int) -> Iterator[Tensor]:
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield torch.from_numpy(rows[order[start : start + batch_size]])


def in_order(rows: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    while True:
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield torch.from_numpy(rows[start : start + batch_size])


def fvu_after(
    batches: Iterator[Tensor],
    held_out: Tensor,
    store: ActivationStore,
    site: object,
    options: argparse.Namespace,
    seed: int,
) -> float:
    """Train on the batches; the share of the held-out rows' variance that the dictionary leaves
    unexplained."""
    gathered = store.statistics(str(site))
    rate = learning_rate_law(options.n_latents, options.steps)
    schedule = schedule_of(steps=options.steps, learning_rate=rate, batch_size=options.batch)
    trainer = Trainer(
        architecture=TopK(k=options.k),
        schedule=schedule,
        weights=random_start(options.n_latents, store.width(str(site)), seed=seed),
        source=normalisation_of(
            torch.from_numpy(gathered.mean), torch.from_numpy(gathered.variance)
        ),
    )
    while not trainer.finished:
        trainer.train_on(Batch(x=next(batches)))
    sae = trainer.finish(Batch(x=held_out), {})
    with torch.no_grad():
        errors = sum(
            float((part - sae(part)).double().square().sum()) for part in held_out.split(2048)
        )
    return errors / float((held_out - held_out.mean(0)).double().square().sum())


if __name__ == "__main__":
    main()
