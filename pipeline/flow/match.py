"""Two sets of unit directions → the k nearest partners of each row, both ways, exactly.

1. The cosine matrix is computed in tiles of `tile` rows × `tile` columns and never kept whole:
   memory is O(tile²).
2. In each tile the maximum of every chunk of 32 neighbours is taken; the k best entries of a row
   must lie in the k chunks with the largest maxima, so only those few are looked at closely. The
   same along columns.
3. The candidates are merged into the running k best of every row and of every column.

Cost: one matrix product of [source, d_model] × [d_model, target], plus two reading passes over each
tile. Only positive cosines count (Feature Flow §3.2); the arithmetic is float32 throughout, on GPUs
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor

from featureflow.errors import UserError
from pipeline.flow.directions import Directions

CHUNK = 32
NO_PARTNER = -1
_PAIRS = 65_536


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The best partners of each row, best first. Empty places have index -1 and cosine 0."""

    cosine: Float[Tensor, "row k"]
    index: Int64[Tensor, "row k"]


@dataclass(frozen=True, kw_only=True)
class Match:
    """`predecessors`: for each target row its best source rows. `successors`: for each source row
    its best targets."""

    predecessors: Nearest
    successors: Nearest


def match(source: Directions, target: Directions, *, k: int = 5, tile: int = 2048) -> Match:
    """Exact top-k cosine both ways. Widths may differ; dimensions may not. Raises UserError."""
    if source.d_model != target.d_model:
        raise UserError(
            "dictionaries of different spaces cannot be compared",
            expected=f"directions of dimension {source.d_model}",
            found=f"dimension {target.d_model}",
            fix="give the projection into the residual stream (W_O for attention dictionaries)",
        )
    if k < 1 or tile < CHUNK:
        raise UserError(
            "bad matcher settings", expected=f"k >= 1, tile >= {CHUNK}", found=f"k {k}, tile {tile}"
        )
    backward = _empty(target, k)
    forward = _empty(source, k)
    with full_precision(), torch.no_grad():
        for columns in _spans(source.n_latents, tile):
            right = rearrange(source.unit[columns], "source d_model -> d_model source")
            for rows in _spans(target.n_latents, tile):
                cosines = target.unit[rows] @ right
                _merge(backward, rows, *_best_of_rows(cosines, k, columns.start))
                _merge(forward, columns, *_best_of_columns(cosines, k, rows.start))
    return Match(predecessors=_finished(backward), successors=_finished(forward))


def led_by(
    found: Match, chosen: Int64[Tensor, "target"], source: Directions, target: Directions
) -> Match:
    """The match with `chosen` as the first predecessor of each target, its cosine measured, the
    others behind it in their order. A target without one (-1), or a dead latent, is as it was."""
    first = chosen.to(target.unit.device)
    known = (first >= 0) & target.usable & source.usable[first.clamp_min(0)]
    cosine = (target.unit * source.unit[first.clamp_min(0)]).sum(1)
    before = found.predecessors
    index = torch.cat([first[:, None], before.index], 1)
    place = torch.where(before.index == first[:, None], 2, 1)
    place = torch.cat([torch.where(known, 0, 3)[:, None], place], 1)
    order = place.argsort(dim=1, stable=True)[:, : before.index.shape[1]]
    strength = torch.cat([cosine[:, None], before.cosine], 1).gather(1, order)
    led = Nearest(cosine=strength, index=index.gather(1, order))
    return Match(predecessors=led, successors=found.successors)


def best_cosines(
    rows: Float[Tensor, "row d_model"], source: Directions, *, tile: int = 2048
) -> Float[Tensor, "row"]:
    """The largest cosine of each of `rows` (unit) with any row of `source`; what a null sample
    needs."""
    best = torch.zeros(rows.shape[0], device=rows.device)
    with full_precision(), torch.no_grad():
        for columns in _spans(source.n_latents, tile):
            for span in _spans(rows.shape[0], tile):
                best[span] = torch.maximum(
                    best[span], (rows[span] @ source.unit[columns].T).amax(1)
                )
    return best


def best_readings(source: Directions, target: Directions, *, k: int, tile: int = 2048) -> Nearest:
    """For each target the `k` sources with which it shares most (`reading`)."""
    best = _empty(target, k)
    with full_precision(), torch.no_grad():
        for columns in _spans(source.n_latents, tile):
            for rows in _spans(target.n_latents, tile):
                there = target.reads[rows] @ source.unit[columns].T
                back = target.unit[rows] @ source.reads[columns].T
                shared = there.clamp_min_(0).mul_(back.clamp_min_(0)).sqrt_()
                _merge(best, rows, *_best_of_rows(shared, k, columns.start))
    return best


def reading(
    source: Directions,
    target: Directions,
    left: Int64[Tensor, "edge"],
    right: Int64[Tensor, "edge"],
) -> Float[Tensor, "edge"]:
    """What two latents read of each other: the geometric mean of the share that the target's
    encoder reads of the source's direction and the share that the source's reads of the target's.
    1 for the same latent; the cosine where encoders are decoders."""
    found = torch.empty(len(left), device=source.unit.device)
    for part in _spans(len(left), _PAIRS):
        a, b = left[part], right[part]
        there = (target.reads[b] * source.unit[a]).sum(1).clamp_min(0)
        found[part] = (there * (target.unit[b] * source.reads[a]).sum(1).clamp_min(0)).sqrt()
    return found


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in whole float32, whatever the process had chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _spans(n: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, n)) for start in range(0, n, tile))


def _empty(side: Directions, k: int) -> Nearest:
    shape = (side.n_latents, k)
    device = side.unit.device
    return Nearest(
        cosine=torch.zeros(shape, device=device),
        index=torch.full(shape, NO_PARTNER, dtype=torch.int64, device=device),
    )


def _best_of_rows(
    cosines: Float[Tensor, "row column"], k: int, offset: int
) -> tuple[Float[Tensor, "row found"], Int64[Tensor, "row found"]]:
    n = cosines.shape[1]
    if n < CHUNK * (k + 1) or n % CHUNK:
        value, place = cosines.topk(min(k, n), dim=1)
        return value, place + offset
    chunked = rearrange(cosines, "row (chunk within) -> row chunk within", within=CHUNK)
    chunks = chunked.amax(2).topk(k, dim=1).indices
    candidates = chunked.gather(1, chunks[:, :, None].expand(-1, -1, CHUNK))
    value, place = rearrange(candidates, "row k within -> row (k within)").topk(k, dim=1)
    column = chunks.gather(1, place // CHUNK) * CHUNK + place % CHUNK
    return value, column + offset


def _best_of_columns(
    cosines: Float[Tensor, "row column"], k: int, offset: int
) -> tuple[Float[Tensor, "column found"], Int64[Tensor, "column found"]]:
    n = cosines.shape[0]
    if n < CHUNK * (k + 1) or n % CHUNK:
        value, place = cosines.topk(min(k, n), dim=0)
        return value.T, place.T + offset
    chunked = rearrange(cosines, "(chunk within) column -> chunk within column", within=CHUNK)
    chunks = rearrange(chunked.amax(1).topk(k, dim=0).indices, "k column -> column k")
    column = torch.arange(cosines.shape[1], device=cosines.device)
    within = torch.arange(CHUNK, device=cosines.device)
    row = rearrange(chunks[:, :, None] * CHUNK + within, "column k within -> column (k within)")
    value, place = cosines[row, column[:, None]].topk(k, dim=1)
    return value, row.gather(1, place) + offset


def _merge(
    best: Nearest, span: slice, value: Float[Tensor, "row found"], index: Int64[Tensor, "row found"]
) -> None:
    k = best.cosine.shape[1]
    both = torch.cat([best.cosine[span], value], dim=1)
    top, place = both.topk(k, dim=1)
    best.cosine[span] = top
    best.index[span] = torch.cat([best.index[span], index], dim=1).gather(1, place)


def _finished(best: Nearest) -> Nearest:
    """A partner must have a positive cosine; rounding may leave a cosine of identical rows a hair
    above 1."""
    positive = best.cosine > 0
    return Nearest(
        cosine=torch.where(positive, best.cosine, 0.0).clamp_max_(1.0),
        index=torch.where(positive, best.index, NO_PARTNER),
    )
