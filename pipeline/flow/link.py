"""Dictionaries of several sites → the flow graph: nodes, edges with evidence, and one report per pair of dictionaries.

For each pair that `pairing.py` finds, in order of depth:

1. match      cosine of unit decoder rows, exact top-k both ways                                     match.py
2. chance     the best cosines that a null model gives; for dictionaries of one start also what inertia leaves   null.py
3. firing     correlation and overlap of firing on held-out tokens, with chance pairs beside         functional.py
4. judge      p-value = the largest over the nulls that apply, q by Benjamini and Hochberg           significance.py
5. keep       by false-discovery rate, or by the paper's fixed cosines

Then nodes get their classes, birth and death, and communities (nodes.py). Cost: one matrix product of
[source, d_model] × [d_model, target] per pair and a fraction more for the null. Memory: the two dictionaries at hand,
their codes, and the table of edges. Sources: Feature Flow (arXiv 2502.03032) §3; the calibration is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, assert_never

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from data.sites import Site
from pipeline.flow.directions import Directions, directions_of
from pipeline.flow.edges import EdgeColumns, edges_of
from pipeline.flow.functional import FEW_FIRINGS, Codes, Cofiring, compare_firing, encode_tokens
from pipeline.flow.match import match
from pipeline.flow.nodes import Side, node_table
from pipeline.flow.null import FarLayers, NullSample, NullSampler, Rotation, mirrored
from pipeline.flow.options import Automatic, Calibrated, Fixed, LinkOptions
from pipeline.flow.pair_report import edge_table, pair_row
from pipeline.flow.pairing import Pair, Pairing, Relation, StartRelation, far_site, pair_sites, start_relation
from pipeline.flow.significance import p_values, q_values
from sae import Sae
from sae.report import Progress, silent

HeldOut = Callable[[Site], Iterable[Float[Tensor, "token d_in"]]]
"""Batches of held-out activations at a site; every site must give the same tokens in the same order."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """The flow graph as tables (schemas in docs/formats.md) and what the user should know about it."""

    nodes: pd.DataFrame
    edges: pd.DataFrame
    pairs: pd.DataFrame
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PairLinks:
    """One pair of dictionaries, linked."""

    pair: Pair
    columns: EdgeColumns
    edges: pd.DataFrame
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """p-values of edges: `cosine` against the decoder nulls, `firing` against chance pairs, `joint` what is judged."""

    cosine: Float[np.ndarray, "edge"]
    firing: Float[np.ndarray, "edge"] | None
    joint: Float[np.ndarray, "edge"]
    q: Float[np.ndarray, "edge"]


def link_dictionaries(
    dictionaries: Mapping[Site, Sae],
    *,
    options: LinkOptions | None = None,
    held_out: HeldOut | None = None,
    start_nulls: Mapping[Relation, NullSample] | None = None,
    projections: Mapping[Site, Float[Tensor, "d_out d_model"]] | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Links:
    """Link all neighbouring dictionaries. Needs only decoders; with `held_out` links carry firing evidence and latents
    that never fire are left out. `start_nulls` are samples of the best cosines that inertia alone leaves between
    dictionaries of one start (start_null.py), by relation. A mapping that loads on access keeps memory at a few
    dictionaries. Raises UserError."""
    settings = options or LinkOptions()
    pairing = pair_sites(dictionaries)
    shelf = _Shelf(dictionaries=dictionaries, held_out=held_out, projections=projections or {}, device=device)
    linked = []
    for done, pair in enumerate(pairing.pairs):
        progress("link pairs", done, len(pairing.pairs))
        linked.append(_link_pair(pair, shelf, settings, (start_nulls or {}).get(pair.relation)))
    progress("link pairs", len(pairing.pairs), len(pairing.pairs))
    return _assembled(linked, shelf, pairing, settings)


@dataclass(kw_only=True)
class _Shelf:
    """Directions and codes of the sites in use; the last few are kept, since pairs come in order of depth."""

    dictionaries: Mapping[Site, Sae]
    held_out: HeldOut | None
    projections: Mapping[Site, Tensor]
    device: str
    n_kept: int = 5
    warnings: list[str] = field(default_factory=list)
    sides: dict[Site, Side] = field(default_factory=dict)
    _recent: dict[Site, tuple[Directions, Codes | None, Mapping[str, Any]]] = field(default_factory=dict)

    def at(self, site: Site) -> tuple[Directions, Codes | None, Mapping[str, Any]]:
        if site not in self._recent:
            while len(self._recent) >= self.n_kept:
                self._recent.pop(next(iter(self._recent)))
            self._recent[site] = self._read(site)
        return self._recent[site]

    def _read(self, site: Site) -> tuple[Directions, Codes | None, Mapping[str, Any]]:
        sae = self.dictionaries[site]
        whole = directions_of(sae.W_dec, name=site.short, projection=self.projections.get(site), device=self.device)
        codes = None if self.held_out is None else encode_tokens(sae, self.held_out(site))
        alive = (
            whole.usable
            if codes is None
            else whole.usable & torch.from_numpy(codes.n_fired > 0).to(whole.usable.device)
        )
        if site not in self.sides:
            self.warnings.extend(whole.warnings)
            self.sides[site] = _side(site, whole, alive, codes)
            if silent_latents := int((whole.usable & ~alive).sum()):
                self.warnings.append(
                    f"{site.short}: {silent_latents} latents never fired on the held-out tokens; left out"
                )
            if not bool(alive.any()):
                self.warnings.append(f"{site.short}: no latent is alive; the site has no links")
        return whole.restricted(alive), codes, sae.metadata


def _side(site: Site, whole: Directions, alive: Tensor, codes: Codes | None) -> Side:
    return Side(
        site=site,
        alive=alive.cpu().numpy(),
        n_fired=None if codes is None else codes.n_fired,
        n_tokens=0 if codes is None else codes.n_tokens,
        mean_share=whole.mean_share,
        n_duplicates=whole.n_duplicates,
    )


def _link_pair(pair: Pair, shelf: _Shelf, options: LinkOptions, start_null: NullSample | None) -> PairLinks:
    source, source_codes, source_facts = shelf.at(pair.source)
    target, target_codes, target_facts = shelf.at(pair.target)
    start = start_relation(source_facts, target_facts)
    found = match(source, target, k=max(options.top_k, 2), tile=options.tile)
    columns = edges_of(found, top_k=options.top_k)
    nulls = _null_samples(pair, shelf, options, start, start_null)
    rng = np.random.default_rng([options.seed, *_numbers(pair)])
    cofiring = None
    if source_codes is not None and target_codes is not None:
        cofiring = compare_firing(
            source_codes, target_codes, (columns.source, columns.target), rng=rng, n_chance=options.n_null
        )
    evidence = _judge(columns, nulls, cofiring, must_fire=start == "same_start")
    kept = _kept(columns, evidence, pair, options)
    return PairLinks(
        pair=pair,
        columns=columns,
        edges=edge_table(pair, columns, evidence, cofiring, kept, sites=[site.short for site in shelf.dictionaries]),
        report=pair_row(
            pair,
            columns,
            evidence,
            cofiring,
            kept,
            start=start,
            nulls=nulls,
            n_sources=source.n_latents,
            few=None if target_codes is None else target_codes.n_fired < FEW_FIRINGS,
            fdr=options.thresholds.fdr if isinstance(options.thresholds, Calibrated) else Calibrated().fdr,
        ),
    )


def _null_samples(
    pair: Pair, shelf: _Shelf, options: LinkOptions, start: StartRelation, start_null: NullSample | None
) -> list[NullSample]:
    source, target = shelf.at(pair.source)[0], shelf.at(pair.target)[0]
    if not bool(source.usable.any()) or not bool(target.usable.any()):
        return []
    entropy = np.random.SeedSequence([options.seed, *_numbers(pair)])
    generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
    match options.null:
        case Automatic():
            samples = [
                NullSampler(choice=Rotation(), n=options.n_null, tile=options.tile).sample(source, target, generator)
            ]
            if start == "same_start":
                inertia = start_null or _far_sample(pair, shelf, None)
                samples += [inertia] if inertia is not None else []
                if inertia is None:
                    shelf.warnings.append(
                        f"{pair}: common start, and nothing tells what inertia leaves; judged by firing"
                    )
            return samples
        case FarLayers(min_distance=distance):
            sample = _far_sample(pair, shelf, distance)
            if sample is None:
                shelf.warnings.append(f"{pair}: no dictionary is far enough for the far-layer null; rotation used")
                return [
                    NullSampler(choice=Rotation(), n=options.n_null, tile=options.tile).sample(
                        source, target, generator
                    )
                ]
            return [sample]
        case choice:
            return [NullSampler(choice=choice, n=options.n_null, tile=options.tile).sample(source, target, generator)]


def _far_sample(pair: Pair, shelf: _Shelf, min_distance: int | None) -> NullSample | None:
    far = far_site(pair, list(shelf.dictionaries), min_distance)
    if far is None:
        return None
    target = shelf.at(pair.target)[0]
    other = shelf.at(far)[0]
    if not bool(other.usable.any()):
        return None
    best = match(other, target, k=1).predecessors.cosine[target.usable, 0].cpu().numpy()
    return NullSample(name=f"far layers ({far.short})", best_cosine=mirrored(best))


def _judge(columns: EdgeColumns, nulls: list[NullSample], cofiring: Cofiring | None, *, must_fire: bool) -> Evidence:
    if not nulls:
        ones = np.ones(len(columns.source))
        return Evidence(cosine=ones, firing=None, joint=ones, q=ones)
    cosine = np.max([p_values(columns.cosine, null.best_cosine) for null in nulls], axis=0)
    firing = None if cofiring is None else p_values(cofiring.links.pearson, cofiring.chance.pearson)
    joint = np.maximum(cosine, firing) if must_fire and firing is not None else cosine
    return Evidence(cosine=cosine, firing=firing, joint=joint, q=q_values(joint, joint[columns.top]))


def _kept(columns: EdgeColumns, evidence: Evidence, pair: Pair, options: LinkOptions) -> np.ndarray:
    match options.thresholds:
        case Calibrated(fdr=rate):
            return evidence.q <= rate
        case Fixed(residual=residual, modules=modules):
            return columns.cosine >= (residual if pair.relation == "residual" else modules)
        case _:
            assert_never(options.thresholds)


def _numbers(pair: Pair) -> tuple[int, ...]:
    return (pair.source.layer, len(pair.source.kind), pair.target.layer, len(pair.target.kind))


def _assembled(linked: list[PairLinks], shelf: _Shelf, pairing: Pairing, options: LinkOptions) -> Links:
    edges = pd.concat([pair.edges for pair in linked], ignore_index=True)
    for site in shelf.dictionaries:
        if site not in shelf.sides:  # a module without a residual site: its features are nodes without links
            shelf.at(site)
    return Links(
        nodes=node_table(shelf.sides, edges, seed=options.seed),
        edges=edges,
        pairs=pd.DataFrame([pair.report for pair in linked]),
        warnings=(*pairing.warnings, *shelf.warnings),
    )
