"""Dictionaries of several sites → the flow graph: nodes, edges with evidence, and one report per
pair of dictionaries.

For each pair that `pairing.py` finds, in order of depth:

1. match      cosine of unit decoder rows, exact top-k both ways; between sites of different width
   the source's rows go through a linear map first   match.py
   choose     first the source that a target shares most with   partner.py
2. chance     the best cosines that a null model gives; for dictionaries of one start also what
   inertia leaves   null.py
3. firing     correlation and overlap of firing on held-out tokens, with chance pairs beside
   functional.py
4. partner    what is left of a target's sources when the best is taken away   partner.py
5. judge      one p-value from all of it, q by Benjamini and Hochberg
   judge.py
6. keep       by false-discovery rate, or by the paper's fixed cosines

Then nodes get their classes, birth and death, and communities (nodes.py). Cost: one matrix product
of [source, d_model] × [d_model, target] per pair and a fraction more for the null. Memory: the two
dictionaries at hand, their codes, and the table of edges. Sources: Feature Flow (arXiv 2502.03032)
§3; the calibration is this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.store.cluster import Machines, map_shards
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from pipeline.flow.edges import EdgeColumns, edges_of
from pipeline.flow.functional import FEW_FIRINGS, compare_firing
from pipeline.flow.judge import Evidence, judge
from pipeline.flow.match import led_by, match
from pipeline.flow.matchers import SHARED, PairData, matcher_named
from pipeline.flow.nodes import Side, node_table
from pipeline.flow.null import (
    DirectionNull,
    FarLayers,
    NullSample,
    NullSampler,
    Rotation,
    Siblings,
    mirrored,
)
from pipeline.flow.options import Automatic, Calibrated, Fixed, LinkOptions
from pipeline.flow.pair_report import edge_table, pair_row
from pipeline.flow.pairing import (
    Pair,
    Pairing,
    Relation,
    StartRelation,
    far_site,
    pair_sites,
    start_relation,
)
from pipeline.flow.partner import most_shared, stand_ins
from pipeline.flow.sae_cache import Decoders, HeldOut, SaeCache
from pipeline.flow.sources import facts_of
from sae import Sae


@dataclass(frozen=True, kw_only=True)
class Links:
    """The flow graph as tables (schemas in docs/formats.md) and what the user should know about
    it."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    pairs: pd.DataFrame
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PairLinks:
    """One pair of dictionaries, linked."""

    pair: Pair
    edges: pd.DataFrame
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Neighbouring pairs that one worker links, and all it needs for that. Travels between
    processes."""

    pairs: tuple[Pair, ...]
    dictionaries: Mapping[Site, Sae]
    facts: Mapping[Site, Mapping[str, Any]]
    options: LinkOptions
    held_out: HeldOut | None
    start_nulls: Mapping[Relation, NullSample]
    projections: Mapping[Site, Tensor]
    decoders: Decoders | None
    device: str


@dataclass(frozen=True, kw_only=True)
class StretchLinks:
    """What came of a stretch."""

    pairs: tuple[Pair, ...]
    linked: list[PairLinks]
    sides: dict[Site, Side]
    warnings: list[str]


def link_dictionaries(
    dictionaries: Mapping[Site, Sae],
    *,
    options: LinkOptions | None = None,
    held_out: HeldOut | None = None,
    start_nulls: Mapping[Relation, NullSample] | None = None,
    projections: Mapping[Site, Float[Tensor, "d_out d_model"]] | None = None,
    decoders: Decoders | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    machines: Machines | None = None,
) -> Links:
    """Link all neighbouring dictionaries. Needs only decoders; with `held_out` links carry firing
    evidence and latents that never fire are left out. `start_nulls` are samples of the best cosines
    that inertia alone leaves between dictionaries of one start (start_null.py), by relation. A
    mapping that loads on access keeps memory at a few dictionaries. `machines` with a Dask
    scheduler spreads the pairs over its workers. Raises UserError."""
    settings = options or LinkOptions()
    matcher_named(settings.matcher)
    facts = facts_of(dictionaries)
    pairing = pair_sites(dictionaries)
    whole = Stretch(
        pairs=pairing.pairs,
        dictionaries=dictionaries,
        facts=facts,
        options=settings,
        held_out=held_out,
        start_nulls=start_nulls or {},
        projections=projections or {},
        decoders=decoders,
        device=device,
    )
    if machines is None or machines.scheduler is None:
        done = [link_stretch(whole, progress)]
    else:
        done = list(map_shards(link_stretch, _cut(whole, 2 * max(1, machines.n_workers)), machines))
    return _assembled(done, dictionaries, pairing, settings)


def link_stretch(stretch: Stretch, progress: Progress = silent) -> StretchLinks:
    """Link the pairs of one stretch, in order of depth."""
    cache = SaeCache(
        dictionaries=stretch.dictionaries,
        held_out=stretch.held_out,
        projections=stretch.projections,
        decoders=stretch.decoders,
        device=stretch.device,
    )
    linked = []
    for place, pair in enumerate(stretch.pairs):
        progress("link pairs", place, len(stretch.pairs))
        linked.append(_link_pair(pair, cache, stretch))
    progress("link pairs", len(stretch.pairs), len(stretch.pairs))
    return StretchLinks(
        pairs=stretch.pairs, linked=linked, sides=cache.sides, warnings=cache.warnings
    )


def _cut(whole: Stretch, n: int) -> list[Stretch]:
    """At most `n` stretches of neighbouring pairs."""
    parts = np.array_split(np.arange(len(whole.pairs)), min(n, len(whole.pairs)))
    return [replace(whole, pairs=tuple(whole.pairs[i] for i in part)) for part in parts]


def _link_pair(pair: Pair, cache: SaeCache, stretch: Stretch) -> PairLinks:
    options = stretch.options
    source, target = cache.at(pair.source), cache.at(pair.target)
    carried = cache.carried(pair)
    start = start_relation(stretch.facts[pair.source], stretch.facts[pair.target])
    ends = (carried, target.directions)
    codes = None
    if source.codes is not None and target.codes is not None:
        codes = (source.codes, target.codes)
    found = match(*ends, k=max(options.top_k, 2), tile=options.tile)
    if options.matcher == SHARED:
        chosen = torch.from_numpy(most_shared(*ends, codes, tile=options.tile))
    else:
        chosen = _chosen(pair, stretch)
    found = led_by(found, chosen, *ends)
    columns = edges_of(found, top_k=options.top_k)
    nulls = _null_samples(pair, cache, stretch, start)
    cofiring = None
    if codes is not None:
        rng = np.random.default_rng([options.seed, *_numbers(pair)])
        links = (columns.source, columns.target)
        cofiring = compare_firing(*codes, links, rng=rng, n_chance=options.n_null)
    few = None if target.codes is None else target.codes.n_fired < FEW_FIRINGS
    fdr = options.thresholds.fdr if isinstance(options.thresholds, Calibrated) else Calibrated().fdr
    evidence = judge(
        columns,
        nulls,
        cofiring,
        few,
        stand_ins=list(stand_ins(*ends, codes, columns, tile=options.tile)),
        fdr=fdr,
        same_start=start == "same_start",
    )
    kept = _kept(columns, evidence, pair, options)
    names = [site.short for site in stretch.facts]
    return PairLinks(
        pair=pair,
        edges=edge_table(pair, columns, evidence, cofiring, kept, fdr=fdr, sites=names),
        report=pair_row(
            pair,
            columns,
            evidence,
            cofiring,
            kept,
            start=start,
            nulls=nulls,
            n_sources=source.directions.n_latents,
            few=few,
            fdr=fdr,
        ),
    )


def _chosen(pair: Pair, stretch: Stretch) -> Int64[Tensor, "target"]:
    """The first predecessor of each target, by the matcher that the recipe names."""
    held_out = stretch.held_out
    if held_out is None:
        raise UserError(
            f"the matcher {stretch.options.matcher!r} may read activations",
            where="link.functional_tokens",
            expected="above 0",
        )
    data = PairData(
        source=stretch.dictionaries[pair.source],
        target=stretch.dictionaries[pair.target],
        rows=lambda: zip(held_out(pair.source), held_out(pair.target), strict=True),
    )
    chosen = matcher_named(stretch.options.matcher)(data)
    n_sources = data.source.n_latents
    if (
        chosen.shape != (data.target.n_latents,)
        or not ((chosen >= -1) & (chosen < n_sources)).all()
    ):
        raise UserError(
            f"the matcher {stretch.options.matcher!r} gave no match",
            expected=f"one source latent (0 to {n_sources - 1}, -1 for none) for each target",
            found=f"shape {chosen.shape}, values {chosen.min()} to {chosen.max()}",
        )
    return torch.from_numpy(chosen.astype(np.int64))


def _null_samples(
    pair: Pair, cache: SaeCache, stretch: Stretch, start: StartRelation
) -> list[NullSample]:
    """The nulls that apply to a pair; none when one side is dead."""
    options = stretch.options
    if not all(bool(cache.at(site).directions.usable.any()) for site in (pair.source, pair.target)):
        return []
    match options.null:
        case Automatic():
            samples = [_drawn(Siblings(), pair, cache, options)]
            if start == "same_start":
                inertia = stretch.start_nulls.get(pair.relation) or _far_sample(
                    pair, cache, stretch, None
                )
                samples += [inertia] if inertia is not None else []
                if inertia is None:
                    cache.warnings.append(
                        f"{pair}: common start, and nothing tells what inertia leaves; judged by "
                        "firing"
                    )
            return samples
        case FarLayers(min_distance=distance):
            sample = _far_sample(pair, cache, stretch, distance)
            if sample is None:
                cache.warnings.append(
                    f"{pair}: no dictionary is far enough for the far-layer null; rotation used"
                )
            return [sample or _drawn(Rotation(), pair, cache, options)]
        case choice:
            return [_drawn(choice, pair, cache, options)]


def _drawn(choice: DirectionNull, pair: Pair, cache: SaeCache, options: LinkOptions) -> NullSample:
    entropy = np.random.SeedSequence([options.seed, *_numbers(pair)])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    sampler = NullSampler(choice=choice, n=options.n_null, tile=options.tile)
    return sampler.sample(cache.carried(pair), cache.at(pair.target).directions, generator)


def _far_sample(
    pair: Pair, cache: SaeCache, stretch: Stretch, min_distance: int | None
) -> NullSample | None:
    far = far_site(pair, list(cache.dictionaries), min_distance)
    if far is None or not bool(cache.at(far).directions.usable.any()):
        return None
    target = cache.at(pair.target).directions
    source = cache.carried(replace(pair, source=far))
    best = match(source, target, k=1).predecessors.cosine[target.usable, 0]
    same = start_relation(stretch.facts[far], stretch.facts[pair.target]) == "same_start"
    return NullSample(
        name=f"far layers ({far.short})", best_cosine=mirrored(best.cpu().numpy()), of_start=same
    )


def _kept(columns: EdgeColumns, evidence: Evidence, pair: Pair, options: LinkOptions) -> np.ndarray:
    match options.thresholds:
        case Calibrated(fdr=rate):
            return evidence.q <= rate
        case Fixed(residual=residual, modules=modules):
            return columns.cosine >= (residual if pair.relation == "residual" else modules)
        case _:
            assert_never(options.thresholds)


def _unknown_starts(linked: Sequence[PairLinks]) -> Iterator[str]:
    """What no null here can see: imported dictionaries that were started alike and do not say
    so."""
    n_unknown = sum(pair.report["start"] == "unknown" for pair in linked)
    if n_unknown:
        yield (
            f"{n_unknown} of {len(linked)} pairs: what the dictionaries were started from is not "
            "known. If it was one "
            "start, cosines are high without training, and more links are kept than are real"
        )


def _numbers(pair: Pair) -> tuple[int, ...]:
    return (pair.source.layer, len(pair.source.kind), pair.target.layer, len(pair.target.kind))


def _assembled(
    done: list[StretchLinks],
    dictionaries: Mapping[Site, Sae],
    pairing: Pairing,
    options: LinkOptions,
) -> Links:
    done = sorted(done, key=lambda part: pairing.pairs.index(part.pairs[0]))
    linked = [pair for part in done for pair in part.linked]
    sides = {site: side for part in done for site, side in part.sides.items()}
    found = (text for part in done for text in part.warnings)
    warnings = dict.fromkeys([*_unknown_starts(linked), *pairing.warnings, *found])
    alone = SaeCache(dictionaries=dictionaries)
    for site in dictionaries:
        if (
            site not in sides
        ):  # a module without a residual site: its features are nodes without links
            alone.at(site)
    edges = pd.concat([pair.edges for pair in linked], ignore_index=True)
    return Links(
        nodes=node_table(
            sides | alone.sides, edges, seed=options.seed, least_agreement=options.least_agreement
        ),
        edges=edges,
        pairs=pd.DataFrame([pair.report for pair in linked]),
        warnings=tuple(warnings),
    )
