"""A linked run seen layer by layer, for the lenses that rerun the papers' experiments.

1. The first held-out contexts give targets and losses (`contexts_of`); held-out rows after them
   give activity (`rows_after_contexts`), so that what is fitted on rows is tested on other text.
2. `layers_of` reads off the edges, for each residual site, the best predecessors by relation and
   their cosines: the scores s(R), s(M), s(A) of Feature Flow §3.3. It is the top-1 link whether or
   not the graph keeps it, as in the paper.
3. `remove_predecessors` is the deactivation experiment of Feature Flow §5.2 at one pair of sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd
from annotated_types import Ge
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import Command, UserError
from featureflow.sites import Site, parse_site
from pipeline.flow.activity import Activity, Predecessors, activity_groups
from pipeline.flow.causal import Contexts, DeactivationOptions, measure_deactivation
from pipeline.flow.functional import encode_tokens
from pipeline.flow.matchers import PairData
from pipeline.flow.pairing import RELATIONS, Relation
from pipeline.flow.sources import HeldOutRows
from pipeline.flow.validation import held_out_contexts
from pipeline.lenses.base import LensConfig
from pipeline.run import Run
from sae import Sae

NTokens = Annotated[int, Ge(1), Doc("held-out tokens on which activity is looked at")]
NPairs = Annotated[int, Ge(1), Doc("layers or pairs of layers, spread over the depth")]
NTargets = Annotated[int, Ge(1), Doc("active features tested per layer")]
NContexts = Annotated[int, Ge(1), Doc("held-out contexts that targets and losses come from")]
NExhaustive = Annotated[
    int, Ge(0), Doc("targets per pair for which every active predecessor is tried")
]
Seed = Annotated[int, Ge(0), Doc("of every choice")]
Item = TypeVar("Item")


class Text(LensConfig):
    """On how much text activity is looked at."""

    n_tokens: NTokens = 8192
    n_contexts: NContexts = 32


class Trials(LensConfig):
    """How much is tested in the model."""

    n_pairs: NPairs = 6
    n_targets: NTargets = 150
    n_contexts: NContexts = 32
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class BestLink:
    """The best predecessors at one site before a target: for each target latent its latent there
    (-1) and cosine."""

    source: Site
    best: Int64[np.ndarray, "target"]
    score: Float[np.ndarray, "target"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A residual site and the best links into it."""

    target: Site
    links: Mapping[Relation, BestLink]


def contexts_of(run: Run, n: int) -> Contexts:
    """The first `n` held-out contexts, at most half of them."""
    return held_out_contexts(run.model, run.store, n_contexts=min(n, _most_contexts(run)))


def rows_after_contexts(run: Run, n_tokens: int, n_contexts: int) -> HeldOutRows:
    """Held-out rows after those contexts. Raises UserError when there are none."""
    store = run.store
    first = -(-store.validation_start // store.n_context) + min(n_contexts, _most_contexts(run))
    kept = store.kept_rows("validation")
    rows = kept[kept >= first * store.n_context][:n_tokens]
    if not len(rows):
        raise UserError(
            "the store has too few held-out tokens",
            where=store.url,
            expected=f"more than {first * store.n_context - store.validation_start} held-out rows",
            fix="raise collect.validation_fraction or collect.n_tokens",
        )
    return HeldOutRows(url=store.url, rows=rows)


def layers_of(run: Run) -> list[Layer]:
    """Every residual site that something is linked to, in order of depth."""
    first = run.graph.edges[run.graph.edges["rank"] == 0]
    layers = []
    for name, group in first.groupby(first["target_site"].astype(str), sort=False):
        target = parse_site(str(name))
        n = run.saes.description(target)["n_latents"]
        links = {
            relation: _best_link(group[group["relation"] == relation], n)
            for relation in RELATIONS
            if (group["relation"] == relation).any()
        }
        layers.append(Layer(target=target, links=links))
    if not layers:
        raise UserError("the flow graph has no links", fix=Command("run", to="link"))
    return sorted(layers, key=lambda layer: layer.target)


def fullest(layers: list[Layer]) -> list[Layer]:
    """The layers with the most kinds of predecessors: all three where modules have dictionaries."""
    most = max(len(layer.links) for layer in layers)
    return [layer for layer in layers if len(layer.links) == most]


def spread(items: list[Item], n: int) -> list[Item]:
    """At most `n` of the items, evenly spread."""
    if n >= len(items):
        return items
    return [items[int(i)] for i in (np.arange(n) + 0.5) * len(items) / n]


def residual_pairs(run: Run) -> list[tuple[Site, Site]]:
    """Every pair of linked neighbours in the residual stream of one width, in order of depth."""
    linked = [layer for layer in layers_of(run) if "residual" in layer.links]
    pairs = [(layer.links["residual"].source, layer.target) for layer in linked]
    width = run.store.width
    if not (found := [(a, b) for a, b in pairs if width(a) == width(b)]):
        raise UserError(
            "there are no neighbouring residual dictionaries of one width",
            found=", ".join(f"{site.short}: {width(site)}" for pair in pairs for site in pair),
            fix="set collect.sites to resid_post",
        )
    return found


def iter_activities(run: Run, held_out: HeldOutRows) -> Iterator[tuple[Layer, Activity]]:
    """The activity groups of every layer on the held-out rows."""
    saes, layers = run.saes.keeping(0), layers_of(run)
    codes = lru_cache(maxsize=5)(lambda site: encode_tokens(saes[site], held_out(site)))
    for layer in run.each("group activations", layers):
        before = {
            relation: Predecessors(codes=codes(link.source), best=link.best)
            for relation, link in layer.links.items()
        }
        yield layer, activity_groups(codes(layer.target), before)


def pair_data(
    saes: Mapping[Site, Sae],
    held_out: HeldOutRows,
    source: Site,
    target: Site,
    *,
    half: int | None = None,
) -> PairData:
    """Two SAEs and activations to match them by: all held-out rows, or the first (0) or second (1)
    half of every batch, so that one half can judge what the other chose."""
    left, right = saes[source], saes[target]
    return PairData(
        source=left,
        target=right,
        rows=lambda: _rows(held_out, source, target, half),
        # wide SAEs are matched among candidates: the dense problem takes minutes from 8k latents
        n_candidates=64 if max(left.n_latents, right.n_latents) > 8192 else None,
    )


def remove_predecessors(
    run: Run,
    saes: Mapping[Site, Sae],
    source: Site,
    target: Site,
    predecessors: Mapping[str, Int64[np.ndarray, "target_latent candidate"]],
    contexts: Contexts,
    *,
    n_targets: int,
    seed: int,
    recorded: Mapping[Site, Tensor] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Trials of removing predecessors (pipeline/flow/causal.py), targets spread over contexts."""
    return measure_deactivation(
        run.model,
        {site: saes[site] for site in (source, target)},
        source=source,
        target=target,
        predecessors=predecessors,
        contexts=contexts,
        options=DeactivationOptions(
            n_targets=n_targets,
            n_targets_per_context=per_context(n_targets, contexts),
            seed=seed + target.layer,
            **options,
        ),
        recorded=recorded,
        progress=run.context.progress,
    )


def per_context(n: int, contexts: Contexts) -> int:
    """How many of `n` targets a context gives, at most."""
    return max(1, -(-n // len(contexts.ids)))


def with_features(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials as readers want them: `target_feature`, `source_feature` and `ancestor_feature` for
    sites and latents; latent -1 is no feature."""
    names = {"target": "target_site", "source": "source_site"}
    if "source_latent" not in trials:
        names["predecessor"] = "source_latent"
    renamed = trials.rename(columns=names)
    for end in ("target", "source", "ancestor"):
        site, latent = f"{end}_site", f"{end}_latent"
        if {site, latent} <= set(renamed):
            named = renamed[site].astype(str) + "/" + renamed[latent].astype(str)
            renamed[f"{end}_feature"] = named.where(renamed[latent] >= 0)
    return renamed


def _most_contexts(run: Run) -> int:
    return max(1, (run.store.n_rows - run.store.validation_start) // run.store.n_context // 2)


def _best_link(edges: pd.DataFrame, n: int) -> BestLink:
    best, score = np.full(n, -1, dtype=np.int64), np.full(n, np.nan)
    latent = edges["target_latent"].to_numpy()
    best[latent], score[latent] = edges["source_latent"].to_numpy(), edges["cosine"].to_numpy()
    return BestLink(source=parse_site(str(edges["source_site"].iloc[0])), best=best, score=score)


def _rows(
    held_out: HeldOutRows, source: Site, target: Site, half: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for left, right in zip(held_out(source), held_out(target), strict=True):
        middle = (len(left) + 1) // 2
        part = slice(None) if half is None else slice(middle) if half == 0 else slice(middle, None)
        if len(left[part]):
            yield left[part], right[part]
