"""Sites and kept edges → the node table: class, life span and community of every latent.

1. Scores: s(P) is the best predecessor cosine for P in residual, MLP, attention; "high" means that
   the link is kept.
2. Class (Feature Flow §3.3): high s(R) alone `translated`; with a module `processed`; a module
   alone `newborn`, if the residual link is not even `related` (judge.py); else `unexplained`.
   Null where it cannot be said: dead latents, modules, and
   the first residual site. `class_fixed` is the same by the paper's fixed cosines.
3. Birth, death and persistence: how far the feature agrees directly with its path (lives.py).
4. Communities over all kept links, by label propagation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64

from featureflow.sites import Site
from pipeline.flow.functional import Codes
from pipeline.flow.lives import lives_of
from pipeline.flow.options import Fixed

CLASSES = ("translated", "processed", "newborn", "unexplained")
LIFE = (
    "birth_layer",
    "death_layer",
    "birth_stepwise",
    "death_stepwise",
    "birth_agreement",
    "death_agreement",
    "ends_agreement",
)
_MOST_ROUNDS = 60
_SCORES = {"residual": "s_residual", "mlp": "s_mlp", "attention": "s_attention"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of one dictionary besides its links. `n_fired` is None when no activations were
    at hand."""

    site: Site
    alive: Bool[np.ndarray, "latent"]
    n_fired: Int64[np.ndarray, "latent"] | None
    n_tokens: int
    mean_share: float
    n_duplicates: int
    codes: Codes | None = None


def node_table(
    sides: Mapping[Site, Side], edges: pd.DataFrame, *, seed: int, least_agreement: float
) -> pd.DataFrame:
    """One row a latent, sites in order of depth, latents in order."""
    ordered = [sides[site] for site in sorted(sides)]
    nodes = pd.concat([_bare(side) for side in ordered], ignore_index=True)
    start = dict(
        zip(
            (s.site.short for s in ordered),
            np.cumsum([0, *(len(s.alive) for s in ordered)]),
            strict=False,
        )
    )
    source = node_numbers(start, edges["source_site"], edges["source_latent"])
    target = node_numbers(start, edges["target_site"], edges["target_latent"])
    kept = edges["kept"].to_numpy(bool)
    _add_scores(nodes, edges, target)
    nodes["class"] = _classes(nodes, edges, _high(nodes, edges, target, "kept"))
    some = _high(nodes, edges, target, "related")["residual"]
    nodes.loc[some & (nodes["class"] == "newborn"), "class"] = "unexplained"
    nodes["class_fixed"] = _classes(nodes, edges, _above_fixed(nodes))
    nodes["n_predecessors"] = np.bincount(target[kept], minlength=len(nodes))
    nodes["n_successors"] = np.bincount(source[kept], minlength=len(nodes))
    _add_lives(nodes, ordered, edges, least_agreement)
    nodes["persistence"] = nodes["death_layer"] - nodes["birth_layer"] + 1
    weight = edges["cosine"].to_numpy()[kept]
    nodes["community"] = communities_of(
        len(nodes),
        source[kept],
        target[kept],
        weight,
        seed=seed,
        start=_chains(nodes, edges, source, target),
    )
    return nodes


def node_numbers(
    start: Mapping[str, int], site: pd.Series, latent: pd.Series
) -> Int64[np.ndarray, "row"]:
    """Row numbers in the node table, where the latents of a site follow one another from
    `start[site]` on."""
    codes, names = pd.factorize(site)
    return np.array([start[name] for name in names], dtype=np.int64)[codes] + latent.to_numpy(
        np.int64
    )


def _bare(side: Side) -> pd.DataFrame:
    n = len(side.alive)
    fired = side.n_fired
    return pd.DataFrame(
        {
            "site": np.full(n, side.site.short, dtype=object),
            "layer": np.full(n, side.site.layer, dtype=np.int16),
            "kind": np.full(n, side.site.kind, dtype=object),
            "latent": np.arange(n),
            "alive": side.alive,
            "density": np.full(n, np.nan) if fired is None else fired / max(side.n_tokens, 1),
        }
    )


def _add_scores(nodes: pd.DataFrame, edges: pd.DataFrame, target: np.ndarray) -> None:
    """Adds s_residual, s_mlp, s_attention; null without such a pair."""
    first = (edges["rank"] == 0).to_numpy()
    for relation, column in _SCORES.items():
        of_relation = (edges["relation"] == relation).to_numpy()
        here = first & of_relation
        score = np.where(
            nodes["site"].isin(edges["target_site"][of_relation].unique()) & nodes["alive"],
            0.0,
            np.nan,
        )
        score[target[here]] = edges["cosine"].to_numpy()[here]
        nodes[column] = score


def _high(
    nodes: pd.DataFrame, edges: pd.DataFrame, target: np.ndarray, held: str
) -> dict[str, np.ndarray]:
    """Which nodes have a best predecessor that is `held` (kept or related), by relation."""
    high = {}
    first = ((edges["rank"] == 0) & edges[held]).to_numpy(bool)
    for relation in _SCORES:
        high[relation] = np.zeros(len(nodes), dtype=bool)
        high[relation][target[first & (edges["relation"] == relation).to_numpy()]] = True
    return high


def _above_fixed(nodes: pd.DataFrame) -> dict[str, np.ndarray]:
    """The same by the paper's cosines."""
    fixed = Fixed()
    cuts = {"residual": fixed.residual, "mlp": fixed.modules, "attention": fixed.modules}
    return {
        relation: (nodes[column] >= cuts[relation]).to_numpy()
        for relation, column in _SCORES.items()
    }


def _classes(
    nodes: pd.DataFrame, edges: pd.DataFrame, high: Mapping[str, np.ndarray]
) -> np.ndarray:
    carried = high["residual"]
    added = high["mlp"] | high["attention"]
    names = np.select(
        [carried & ~added, carried & added, ~carried & added], CLASSES[:3], CLASSES[3]
    ).astype(object)
    scored = nodes["site"].isin(edges.loc[edges["relation"] == "residual", "target_site"].unique())
    names[~(scored & nodes["alive"]).to_numpy()] = None
    return names


def _add_lives(nodes: pd.DataFrame, ordered: list[Side], edges: pd.DataFrame, least: float) -> None:
    """Adds the columns of `lives_of`; a module's latents live in their own layer."""
    chain = [side.site for side in ordered if side.site.is_residual]
    widths = {side.site: len(side.alive) for side in ordered}
    codes = {side.site: side.codes for side in ordered if side.codes is not None}
    known = codes if set(chain) <= set(codes) else {}
    lives = lives_of(chain, widths, edges, known, least=least)
    bare = {name: np.nan for name in LIFE if name.endswith("agreement")}
    parts = [
        lives[side.site]
        if side.site in lives
        else pd.DataFrame(
            {name: np.full(len(side.alive), bare.get(name, side.site.layer)) for name in LIFE}
        )
        for side in ordered
    ]
    nodes[list(LIFE)] = pd.concat(parts, ignore_index=True)[list(LIFE)]


def _chains(
    nodes: pd.DataFrame, edges: pd.DataFrame, source: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """For every node the first node of its chain of kept residual links that are first choice both
    ways."""
    first = np.arange(len(nodes))
    chosen = ((edges["relation"] == "residual") & edges["kept"] & edges["mutual"]).to_numpy(bool)
    for rows in _groups_by_target(edges, chosen):
        first[target[rows]] = first[source[rows]]
    return first


def _groups_by_target(edges: pd.DataFrame, chosen: np.ndarray) -> list[np.ndarray]:
    """Row numbers of the chosen edges, one group per target site; edges are stored in order of
    depth."""
    rows = np.flatnonzero(chosen)
    codes, names = pd.factorize(edges["target_site"].iloc[rows])
    return [rows[codes == code] for code in range(len(names))]


def communities_of(
    n_nodes: int,
    source: Int64[np.ndarray, "link"],
    target: Int64[np.ndarray, "link"],
    weight: Float[np.ndarray, "link"],
    *,
    seed: int,
    start: Int64[np.ndarray, "node"] | None = None,
) -> Int64[np.ndarray, "node"]:
    """The community of each node by label propagation (Raghavan et al. 2007, arXiv 0709.2938); -1
    for a node without links. `start` gives nodes that belong together one label: on bare chains
    propagation alone stops at pairs.

    1. In each round half of the nodes, drawn at random, take the label with the largest summed
       weight among their neighbours (both directions); ties go to the smallest label. Half at a
       time: all at once oscillates on chains.
    2. Stops when nobody changes. Labels are then numbered by size, largest first.

    Cost O(rounds · links · log links), vectorised: a graph of 60,000 nodes takes seconds."""
    node = np.concatenate([source, target])
    neighbour = np.concatenate([target, source])
    both = np.concatenate([weight, weight])
    rng = np.random.default_rng(seed)
    label = np.arange(n_nodes) if start is None else start
    for _ in range(_MOST_ROUNDS):
        wanted = _strongest_label(label, node, neighbour, both)
        differs = wanted != label
        if not differs.any():
            break
        moving = differs & (rng.random(n_nodes) < 0.5)
        label = np.where(moving, wanted, label)
    return _numbered(label, np.unique(node))


def _strongest_label(
    label: np.ndarray, node: np.ndarray, neighbour: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """For each node the label its neighbours carry most; its own label counts a little, so that
    ties do not flip."""
    n = len(label)
    key = np.concatenate([node * n + label[neighbour], np.arange(n) * n + label])
    strength = np.concatenate([weight, np.full(n, 1e-6)])
    groups, place = np.unique(key, return_inverse=True)
    total = np.bincount(place, weights=strength)
    owner = groups // n
    order = np.lexsort((groups % n, -total, owner))
    first = order[np.unique(owner[order], return_index=True)[1]]
    return groups[first] % n


def _numbered(label: np.ndarray, linked: np.ndarray) -> np.ndarray:
    values, place, counts = np.unique(label[linked], return_inverse=True, return_counts=True)
    number = np.empty(len(values), dtype=np.int64)
    number[np.lexsort((values, -counts))] = np.arange(len(values))
    community = np.full(len(label), -1, dtype=np.int64)
    community[linked] = number[place]
    return community
