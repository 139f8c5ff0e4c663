"""Sites → the pairs of dictionaries that are linked, and how each pair's dictionaries were started.

1. Sites of the residual stream form one chain in the order of computation; each is linked to the
   one before it (relation `residual`).
2. The output of an MLP or an attention layer, and what its heads compute before W_O, is linked to
   the first residual site of its own layer that contains it (relations `mlp`, `attention`). What
   an MLP reads after its norm is not linked: it is the stream again, in other units.
3. Missing layers do not stop the work: the link then spans a gap, which is recorded.

Source: Feature Flow (arXiv 2502.03032) §3.3: one residual chain with one MLP leaf and one attention
leaf a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from featureflow.errors import UserError
from featureflow.sites import Site

Relation = Literal["residual", "mlp", "attention"]
RELATIONS: tuple[Relation, ...] = ("residual", "mlp", "attention")
StartRelation = Literal["independent", "same_start", "unknown"]
MODULES: dict[str, Relation] = {"mlp_out": "mlp", "attn_out": "attention", "z": "attention"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two linked sites; `source` comes first in the computation. `gap` is how many layers are
    skipped between them."""

    source: Site
    target: Site
    relation: Relation

    @property
    def gap(self) -> int:
        return max(0, self.target.layer - self.source.layer - 1)

    def __str__(self) -> str:
        return f"{self.source.short} → {self.target.short}"


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """All pairs of a set of sites in order of depth, and what the user should know about them."""

    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]


def pair_sites(sites: Iterable[Site]) -> Pairing:
    """The pairs to link. Raises UserError when nothing can be linked."""
    ordered = sorted(set(sites))
    chain = [site for site in ordered if site.is_residual]
    pairs = [Pair(source=a, target=b, relation="residual") for a, b in pairwise(chain)]
    warnings = [
        f"{pair}: {pair.gap} layer(s) have no dictionary; linked across them"
        for pair in pairs
        if pair.gap
    ]
    for site in ordered:
        if site.is_residual:
            continue
        if site.kind not in MODULES:
            warnings.append(
                f"{site.short}: what an MLP reads is the stream after a norm; its features are not "
                "linked"
            )
            continue
        target = next((r for r in chain if r.layer == site.layer and r > site), None)
        if target is None:
            warnings.append(
                f"{site.short}: no residual dictionary of its layer; its features are not linked"
            )
        else:
            pairs.append(Pair(source=site, target=target, relation=MODULES[site.kind]))
    if not pairs:
        raise UserError(
            "nothing to link",
            expected="dictionaries of at least two residual sites, or of a module and the residual "
            "site after it",
            found=", ".join(site.short for site in ordered) or "no dictionaries",
            fix="train dictionaries at more sites (collect.sites in the recipe)",
        )
    return Pairing(
        pairs=tuple(sorted(pairs, key=lambda p: (p.target, p.source))), warnings=tuple(warnings)
    )


def far_site(pair: Pair, sites: Sequence[Site], min_distance: int | None) -> Site | None:
    """The site of the source's kind farthest from the target; None if it is nearer than
    `min_distance` layers."""
    layers = [site.layer for site in sites if site.kind == pair.source.kind]
    needed = (
        min_distance if min_distance is not None else max(3, (max(layers) - min(layers) + 1) // 2)
    )
    others = [site for site in sites if site.kind == pair.source.kind]
    farthest = max(others, key=lambda site: (abs(site.layer - pair.target.layer), site.layer))
    return farthest if abs(farthest.layer - pair.target.layer) >= needed else None


def start_relation(source: Mapping[str, Any], target: Mapping[str, Any]) -> StartRelation:
    """Whether two dictionaries left a common starting point, from their metadata."""
    starts = [metadata.get("initialisation") for metadata in (source, target)]
    if not all(isinstance(start, Mapping) for start in starts):
        return "unknown"
    groups = [start.get("group") for start in starts if isinstance(start, Mapping)]
    same = groups[0] is not None and groups[0] == groups[1]
    return "same_start" if same else "independent"
