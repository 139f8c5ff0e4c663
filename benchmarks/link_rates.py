"""Realised false-discovery rate and recall of links on planted dictionaries, by cosine and reading
alone (no tokens).

    python -m benchmarks.link_rates      one JSON line a cell, then two Markdown tables

The plants are those of tests/pipeline/flow/test_siblings.py: of 768 targets a share is carried from
768 sources (turned to a cosine of 0.75 to 0.98) and the rest is new; noise 0.3 on both sides.
Encoders are decoders, so nothing but directions tells a partner. All best links of all seeds are
pooled. The second table has other widths, copies and rows without a direction, at every rate.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from torch import Tensor

from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import LinkOptions
from tests.pipeline.flow.conftest import dictionary
from tests.pipeline.flow.test_siblings import SOURCE, SPACES, TARGET, planted

CARRIED = (0.5, 0.1)
RATES = (0.01, 0.05, 0.1)
N = 768
ALL_AND_COPIES = N + N // 5
Plant = tuple[Tensor, Tensor, np.ndarray]


def main() -> None:
    """Print every cell, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    spaces = [
        (name, f"{share:.0%}", [_space(name, d, share, options.seeds) for d in options.dimensions])
        for name in SPACES
        for share in CARRIED
    ]
    shapes = [_shape(name, options.seeds) for name in SHAPES]
    print("\n| space | carried | " + " | ".join(f"d = {d}" for d in options.dimensions) + " |")
    print("|---" * (len(options.dimensions) + 2) + "|")
    for name, share, cells in spaces:
        print(f"| {name} | {share} | " + " | ".join(_short(cell, 0.05) for cell in cells) + " |")
    print("\n| plant | " + " | ".join(f"nominal {rate:.0%}" for rate in RATES) + " |")
    print("|---" * (len(RATES) + 1) + "|")
    for name, cell in zip(SHAPES, shapes, strict=True):
        print(f"| {name} | " + " | ".join(_short(cell, rate) for rate in RATES) + " |")


def _wider(seed: int) -> Plant:
    return planted(128, seed=seed, n=2048, n_sources=512, **SPACES["clusters in a power law"])


def _narrower(seed: int) -> Plant:
    return planted(128, seed=seed, n=512, n_sources=2048, **SPACES["clusters in a power law"])


def _copies(seed: int) -> Plant:
    """A fifth of the sources twice; a copy has its original's number."""
    source, target, true = planted(128, seed=seed, **SPACES["clusters"])
    return torch.cat([source, source[: len(source) // 5]]), target, true


def _dead(seed: int) -> Plant:
    """Two fifths of the rows of both sides without a direction."""
    source, target, true = planted(128, seed=seed, **SPACES["clusters"])
    rng = np.random.default_rng(seed)
    gone = rng.random(len(source)) < 0.4
    silent = rng.random(len(target)) < 0.4
    source, target = source.clone(), target.clone()
    source[torch.from_numpy(gone)], target[torch.from_numpy(silent)] = 0.0, 0.0
    return source, target, np.where(silent | gone[true], -1, true)


SHAPES = {
    "512 → 2,048, clusters in a power law, d = 128": _wider,
    "2,048 → 512, clusters in a power law, d = 128": _narrower,
    "a fifth of the sources twice, clusters, d = 128": _copies,
    "two fifths of the rows zero, clusters, d = 128": _dead,
}


def _space(name: str, d: int, carried: float, n_seeds: int) -> dict[float, tuple[float, float]]:
    plants = [planted(d, seed=seed, carried=carried, **SPACES[name]) for seed in range(n_seeds)]
    found = _rates(plants)
    _print({"space": name, "d": d, "carried": carried}, found)
    return found


def _shape(name: str, n_seeds: int) -> dict[float, tuple[float, float]]:
    found = _rates([SHAPES[name](seed) for seed in range(n_seeds)])
    _print({"plant": name}, found)
    return found


def _rates(plants: list[Plant]) -> dict[float, tuple[float, float]]:
    """Realised false-discovery rate and recall at every nominal rate."""
    linked = [_best(source, target) for source, target, _ in plants]
    there = sum(int((true >= 0).sum()) for _, _, true in plants)
    found = {}
    for rate in RATES:
        false = right = 0
        for (source, _, true), (chosen, to, q) in zip(plants, linked, strict=True):
            n_own = len(source) if len(source) != ALL_AND_COPIES else N
            hit = (true[to] >= 0) & (true[to] == chosen % n_own)
            right += int((hit & (q <= rate)).sum())
            false += int((~hit & (q <= rate)).sum())
        found[rate] = (false / max(false + right, 1), right / there)
    return found


def _best(source: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target and q-value of every best link."""
    pair = {SOURCE: dictionary(source), TARGET: dictionary(target)}
    edges = link_dictionaries(pair, options=LinkOptions(top_k=1)).edges
    best = edges[edges["rank"] == 0]
    return tuple(best[name].to_numpy() for name in ("source_latent", "target_latent", "q_value"))


def _print(cell: dict, found: dict[float, tuple[float, float]]) -> None:
    rates = {str(r): {"false": round(f, 4), "recall": round(g, 4)} for r, (f, g) in found.items()}
    print(json.dumps(cell | rates), flush=True)


def _short(found: dict[float, tuple[float, float]], rate: float) -> str:
    false, recall = found[rate]
    return f"{false:.3f} ({recall:.2f})"


if __name__ == "__main__":
    main()
