"""Paths of kept links and activity on held-out tokens → how long each feature really lasts.

Small steps add up: a path may link every layer to the next while its ends share nothing (on chained
SmolLM2 dictionaries the ends of paths through 30 layers correlated by 0.15). So a feature's life
is as long as it agrees *directly* with the members of its path:

1. go back along kept best predecessors, one layer at a time; the walk ends where there is no link
   or where the member's activations correlate with the feature's own by less than `least`;
2. the same forward along kept best successors;
3. `birth_layer` and `death_layer` are the ends, `birth_agreement` and `death_agreement` the
   correlations with the members there, `ends_agreement` that of the two ends with each other.

`birth_stepwise` and `death_stepwise` are the ends of the walk without step 1's test. Without
held-out tokens nothing is known directly: the lives are the stepwise ones and the agreements NaN.
Cost: for every pair of layers one sparse product of the codes that are still being followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

from featureflow.sites import Site
from pipeline.flow.functional import Codes, agreement

NOBODY = -1


def lives_of(
    chain: Sequence[Site],
    widths: Mapping[Site, int],
    edges: pd.DataFrame,
    codes: Mapping[Site, Codes],
    *,
    least: float,
) -> dict[Site, pd.DataFrame]:
    """For each residual site of `chain` (in order of depth) one row a latent: `birth_layer,
    death_layer, birth_stepwise, death_stepwise, birth_agreement, death_agreement,
    ends_agreement`."""
    back = [_choice(edges, a, b, widths[b], "rank") for a, b in _steps(chain)]
    ahead = [_choice(edges, a, b, widths[a], "forward_rank") for a, b in _steps(chain)]
    layers = np.array([site.layer for site in chain])
    found = {}
    for here, site in enumerate(chain):
        n = widths[site]
        behind = [(i, back[i]) for i in range(here - 1, -1, -1)]
        beyond = [(i, ahead[i - 1]) for i in range(here + 1, len(chain))]
        first = _walk(site, here, n, chain, behind, codes, least)
        last = _walk(site, here, n, chain, beyond, codes, least)
        found[site] = pd.DataFrame(
            {
                "birth_layer": layers[first["place"]],
                "death_layer": layers[last["place"]],
                "birth_stepwise": layers[first["stepwise"]],
                "death_stepwise": layers[last["stepwise"]],
                "birth_agreement": first["agreement"],
                "death_agreement": last["agreement"],
                "ends_agreement": _ends(chain, first, last, codes),
            }
        )
    return found


def _walk(
    site: Site,
    here: int,
    n: int,
    chain: Sequence[Site],
    steps: Sequence[tuple[int, Int64[np.ndarray, "latent"]]],
    codes: Mapping[Site, Codes],
    least: float,
) -> dict[str, np.ndarray]:
    """Where the walk from every latent of a site ends: the place in the chain, the member there,
    its agreement with the latent, and the place without the test of agreement."""
    place, stepwise = np.full(n, here), np.full(n, here)
    member, agreed = np.arange(n), np.full(n, 1.0 if site in codes else np.nan)
    at, direct = np.arange(n), np.ones(n, dtype=bool)
    for there, choice in steps:
        at = np.where(at >= 0, choice[np.maximum(at, 0)], NOBODY)
        if not (at >= 0).any():
            break
        stepwise[at >= 0] = there
        direct &= at >= 0
        if site in codes:
            asked = np.flatnonzero(direct)
            r = agreement(codes[chain[there]], codes[site], at[asked], asked)
            direct[asked[r < least]] = False
            agreed[asked[r >= least]] = r[r >= least]
        place[direct], member[direct] = there, at[direct]
    return {"place": place, "stepwise": stepwise, "member": member, "agreement": agreed}


def _ends(
    chain: Sequence[Site],
    first: Mapping[str, np.ndarray],
    last: Mapping[str, np.ndarray],
    codes: Mapping[Site, Codes],
) -> Float[np.ndarray, "latent"]:
    found = np.full(len(first["place"]), np.nan)
    pairs = np.stack([first["place"], last["place"]], axis=1)
    for begin, end in np.unique(pairs, axis=0) if codes else ():
        rows = np.flatnonzero((pairs == (begin, end)).all(axis=1))
        a, b = codes[chain[begin]], codes[chain[end]]
        found[rows] = agreement(a, b, first["member"][rows], last["member"][rows])
    return found


def _steps(chain: Sequence[Site]) -> Iterator[tuple[Site, Site]]:
    return itertools.pairwise(chain)


def _choice(
    edges: pd.DataFrame, source: Site, target: Site, n: int, rank: str
) -> Int64[np.ndarray, "latent"]:
    """For each latent of the target (`rank`) or the source (`forward_rank`) its first choice among
    kept links; `NOBODY` for none."""
    between = (edges["source_site"] == source.short) & (edges["target_site"] == target.short)
    chosen = edges[between & edges["kept"] & (edges[rank] == 0)]
    own, other = ("target", "source") if rank == "rank" else ("source", "target")
    choice = np.full(n, NOBODY, dtype=np.int64)
    choice[chosen[f"{own}_latent"].to_numpy()] = chosen[f"{other}_latent"].to_numpy()
    return choice
