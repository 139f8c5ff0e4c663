"""The inner loops of the survey, compiled by Numba (sae/kernels/cpu.py); encoder and counts call
them.

    split_by_rank   of the largest entries of each row: which are active, which only nearly
    by_latent       a counting sort of entries by latent, in the order they come in
    count_values    how often each latent's entries have each value, in one table of its own

Cost: one walk over the entries each; `count_values` sorts the values that a latent has.
"""

from __future__ import annotations

import numpy as np

from sae.kernels.cpu import compiled


@compiled()
def split_by_rank(value: np.ndarray, k: int, rank: np.ndarray, gap: np.ndarray) -> None:
    """`value` [row wide] holds the largest entries of each row, in the order of their latents.
    `rank` [row wide] receives 1 for the `k` largest, 2 for the others, 0 where not positive; `gap`
    how far the others stay below the k-th, as a share of it. Of equal values the first wins."""
    n_rows, wide = value.shape
    order = np.empty(wide, np.int64)
    for r in range(n_rows):
        v = value[r]
        for i in range(wide):
            j = i
            while j > 0 and v[order[j - 1]] < v[i]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = i
        edge = v[order[min(k, wide) - 1]]
        for place in range(wide):
            i = order[place]
            rank[r, i] = 0 if not v[i] > 0 else 1 if place < k else 2
            gap[r, i] = (edge - v[i]) / edge if edge > 0 else np.float32(0)


@compiled()
def by_latent(latent: np.ndarray, start: np.ndarray, order: np.ndarray) -> None:
    """`start` [latent_and_one] are zeros that become where each latent's entries start; `order`
    [entry] lists the entries by latent."""
    for e in range(len(latent)):
        start[latent[e] + 1] += 1
    for i in range(len(start) - 1):
        start[i + 1] += start[i]
    place = start[:-1].copy()
    for e in range(len(latent)):
        order[place[latent[e]]] = e
        place[latent[e]] += 1


@compiled()
def count_values(
    start: np.ndarray,
    row: np.ndarray,
    code: np.ndarray,
    mass: np.ndarray,
    of_row: np.ndarray,
    slot: np.ndarray,
    key: np.ndarray,
    columns: np.ndarray,
) -> int:
    """Entries of latent f are `start[f] … start[f + 1]`, with value `of_row[row]` (−1: none) and
    a code: part · 2 + strong, or 6. Returns how many pairs (latent, value) there are; `key` [pair]
    receives them ascending, as `f · n_values + value`, `columns` [column pair] the numbers of
    COLUMNS (pipeline/describe/counts.py). `slot` [value] is −1, and is −1 afterwards."""
    n_values, most = len(slot), 0
    for f in range(len(start) - 1):
        most = max(most, start[f + 1] - start[f])
    values = np.empty(most, np.int32)
    n, total = np.zeros((most, 7), np.int32), np.zeros((most, 2))
    n_pairs = 0
    for f in range(len(start) - 1):
        n_seen = 0
        for e in range(start[f], start[f + 1]):
            v = of_row[row[e]]
            if v < 0:
                continue
            s = slot[v]
            if s < 0:
                s = slot[v] = n_seen
                values[n_seen] = v
                n_seen += 1
            c = code[e]
            n[s, c] += 1
            if c < 6:
                total[s, c >> 2] += mass[e]
        values[:n_seen].sort()
        for i in range(n_seen):
            v = values[i]
            s = slot[v]
            slot[v] = -1
            key[n_pairs] = np.int64(f) * n_values + v
            for part in range(3):
                columns[2 * part, n_pairs] = n[s, 2 * part] + n[s, 2 * part + 1]
                columns[2 * part + 1, n_pairs] = n[s, 2 * part + 1]
            columns[6, n_pairs], columns[8, n_pairs] = total[s, 1], total[s, 0]
            columns[7, n_pairs] = n[s, 6]
            n[s], total[s] = 0, 0
            n_pairs += 1
    return n_pairs
