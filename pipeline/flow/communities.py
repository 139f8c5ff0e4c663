"""Kept links → communities of features, by label propagation (Raghavan et al. 2007, arXiv
0709.2938).

1. Every node starts with a label of its own, or with that of the chain it belongs to: on bare
   chains propagation alone stops at pairs.
2. In each round half of the nodes, drawn at random, take the label with the largest summed weight
   among their neighbours (both directions); ties go to the smallest label. Half at a time: all at
   once oscillates on chains.
3. Stops when nobody changes. Labels are then numbered by size, largest first; nodes without links
   get -1.

Cost O(rounds · links · log links), vectorised: a graph of 60,000 nodes takes seconds.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64


def communities_of(
    n_nodes: int,
    source: Int64[np.ndarray, "link"],
    target: Int64[np.ndarray, "link"],
    weight: Float[np.ndarray, "link"],
    *,
    seed: int,
    start: Int64[np.ndarray, "node"] | None = None,
    max_rounds: int = 60,
) -> Int64[np.ndarray, "node"]:
    """The community of each node; -1 for a node without links. `start` gives nodes that belong
    together one label."""
    node = np.concatenate([source, target])
    neighbour = np.concatenate([target, source])
    both = np.concatenate([weight, weight])
    rng = np.random.default_rng(seed)
    label = np.arange(n_nodes) if start is None else start
    for _ in range(max_rounds):
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
