"""From the kept samples to the examples a card shows, in four tabs.

1. *top*: the strongest activations, one per document, no repeated text;
2. *decile*: activations from every tenth of the activation range by count, strongest tenth first.
   All are real activations: the intervals are between quantiles of the activations, never between 0
   and the maximum;
3. *uniform*: activations drawn uniformly;
4. *near_miss*: tokens where the latent was almost active.

Quantiles are exact while the uniform sample holds every activation; otherwise they come from the
histogram, whose bins are a
quarter of an octave wide, by interpolation in log a.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8, Int64, UInt8

from pipeline.describe.selection import Selection
from pipeline.describe.survey import BINS_PER_OCTAVE, LOG2_LOW, Survey

TABS = ("top", "decile", "uniform", "near_miss")
NO_DECILE = 255


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How many examples of each kind a card shows, and how many the pass keeps to choose from."""

    n_top: int
    n_per_decile: int
    n_uniform: int
    n_near: int
    n_reservoir: int


PROFILES = {
    "mini": Profile(n_top=6, n_per_decile=1, n_uniform=2, n_near=2, n_reservoir=48),
    "standard": Profile(n_top=10, n_per_decile=1, n_uniform=4, n_near=4, n_reservoir=64),
    "full": Profile(n_top=20, n_per_decile=3, n_uniform=10, n_near=8, n_reservoir=128),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Examples of all latents of a site; those of latent f are `offset[f] … offset[f + 1]`, in tab
    order. `act_*` are the
    latent's activations around each peak: `act_offset[e] … act_offset[e + 1]`."""

    offset: Int64[np.ndarray, "latent_and_one"]
    tab: UInt8[np.ndarray, "example"]
    decile: UInt8[np.ndarray, "example"]
    row: Int64[np.ndarray, "example"]
    value: Float32[np.ndarray, "example"]
    gap: Float32[np.ndarray, "example"]
    act_offset: Int64[np.ndarray, "example_and_one"]
    act_at: Int8[np.ndarray, "act"]
    act_value: UInt8[np.ndarray, "act"]


def deciles_of(survey: Survey) -> Float32[np.ndarray, "latent eleven"]:
    """Quantiles 0, .1 … 1 of each latent's activations; NaN for one that was never active."""
    shares = np.linspace(0, 1, 11)
    out = _quantiles_of_histogram(survey.histogram, shares)
    out[:, 10] = survey.largest
    filled = survey.uniform.filled
    exact = np.flatnonzero((survey.count > 0) & (survey.count == filled.sum(axis=1)))
    if len(exact):
        values = np.where(filled[exact], survey.uniform.value[exact], np.nan).astype(np.float64)
        out[exact] = np.nanquantile(values, shares, axis=1).T
    out[survey.count == 0] = np.nan
    return np.minimum(out, survey.largest[:, None]).astype(np.float32)


def choose_examples(
    survey: Survey, deciles: Float32[np.ndarray, "latent eleven"], profile: Profile
) -> Examples:
    """Pick what the card shows; vectorised over all latents of the site."""
    decile_of = (survey.uniform.value[:, :, None] >= deciles[:, None, 1:10]).sum(axis=2)
    picks = [
        _pick(survey.top, _first(survey.top.filled, profile.n_top), 0, None),
        _pick(
            survey.uniform,
            _per_decile(survey.uniform.filled, decile_of, profile.n_per_decile),
            1,
            decile_of,
        ),
        _pick(survey.uniform, _first(survey.uniform.filled, profile.n_uniform), 2, decile_of),
        _pick(survey.near, _first(survey.near.filled, profile.n_near), 3, None),
    ]
    latent, tab, decile, row, value, gap, around = (
        np.concatenate(parts) for parts in zip(*picks, strict=True)
    )
    strongest_first = np.where(tab == 1, 255 - decile, 0)
    order = np.lexsort((np.arange(len(latent)), strongest_first, tab, latent))
    latent, tab, decile, row, value, gap, around = (
        a[order] for a in (latent, tab, decile, row, value, gap, around)
    )
    decile = np.where(
        tab == 0, (value[:, None] >= deciles[latent, 1:10]).sum(axis=1), decile
    ).astype(np.uint8)
    decile[tab == 3] = NO_DECILE
    example, place = np.nonzero(around)
    share = (
        around[example, place].astype(np.float32) * value[example] / survey.largest[latent[example]]
    )
    return Examples(
        offset=np.searchsorted(latent, np.arange(survey.n_latents + 1)),
        tab=tab,
        decile=decile,
        row=row,
        value=value,
        gap=gap,
        act_offset=np.searchsorted(example, np.arange(len(latent) + 1)),
        act_at=(place - around.shape[1] // 2).astype(np.int8),
        act_value=np.clip(np.rint(share * 255), 1, 255).astype(np.uint8),
    )


def _first(filled: Bool[np.ndarray, "latent place"], n: int) -> Bool[np.ndarray, "latent place"]:
    return filled & (np.arange(filled.shape[1]) < n)


def _per_decile(
    filled: Bool[np.ndarray, "latent place"], decile_of: Int64[np.ndarray, "latent place"], n: int
) -> Bool[np.ndarray, "latent place"]:
    """The first n of every decile; the sample is in random order, so these are random activations
    of the decile."""
    chosen = np.zeros_like(filled)
    for decile in range(10):
        member = filled & (decile_of == decile)
        chosen |= member & (member.cumsum(axis=1) <= n)
    return chosen


def _pick(
    selection: Selection,
    mask: Bool[np.ndarray, "latent place"],
    tab: int,
    decile_of: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    latent, place = np.nonzero(mask)
    decile = (
        np.zeros(len(latent), np.uint8)
        if decile_of is None
        else decile_of[latent, place].astype(np.uint8)
    )
    chosen = (selection.row, selection.value, selection.gap, selection.around)
    return latent, np.full(len(latent), tab, np.uint8), decile, *(a[latent, place] for a in chosen)


def _quantiles_of_histogram(
    histogram: Int64[np.ndarray, "latent bin"], shares: Float64[np.ndarray, "share"]
) -> Float64[np.ndarray, "latent share"]:
    """Interpolated quantiles: in the bin that holds the share, log a grows linearly with the
    count."""
    running = histogram.cumsum(axis=1)
    total = running[:, -1:]
    target = shares[None, :] * total
    bins = (
        (running[:, None, :] < np.maximum(target, 1e-9)[:, :, None])
        .sum(axis=2)
        .clip(max=histogram.shape[1] - 1)
    )
    below = np.take_along_axis(np.pad(running, ((0, 0), (1, 0))), bins, axis=1)
    inside = np.maximum(np.take_along_axis(histogram, bins, axis=1), 1)
    return 2.0 ** (LOG2_LOW + (bins + (target - below) / inside) / BINS_PER_OCTAVE)
