"""What every experiment is given: a flow graph's edges, its dictionaries, held-out activations, the
model if it is needed, and how much to do; and what it gives back: tables, a figure and a text.

`layers_of` reads off the edges, for each residual site, its best predecessors by relation and their
cosines, the scores s(R), s(M), s(A) of Feature Flow §3.3: the top-1 link whether or not the graph
keeps it, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pandas as pd
from annotated_types import Ge
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from featureflow.errors import Command, UserError
from featureflow.progress import Progress, silent
from featureflow.settings import Settings
from featureflow.sites import Site, parse_site
from pipeline.flow.activity import Activity, Predecessors, activity_groups
from pipeline.flow.causal import Contexts
from pipeline.flow.matchers import PairData
from pipeline.flow.pairing import RELATIONS, Relation
from pipeline.flow.shelf import HeldOut, Shelf
from sae import Sae

Item = TypeVar("Item")


class Effort(Settings):
    """How much an experiment does. Part of its artifact's digest."""

    n_tokens: Annotated[int, Ge(1), Doc("held-out tokens on which firing is looked at")] = 8192
    n_pairs: Annotated[int, Ge(1), Doc("layers or pairs of layers, spread over the depth")] = 6
    n_targets: Annotated[int, Ge(1), Doc("firing features tested per layer")] = 150
    n_contexts: Annotated[
        int, Ge(1), Doc("held-out contexts that targets and losses come from")
    ] = 32
    n_exhaustive: Annotated[
        int, Ge(0), Doc("targets per pair for which every active predecessor is tried")
    ] = 20
    seed: Annotated[int, Ge(0), Doc("of every choice")] = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A linked model. `open_model` and `contexts` are called only by experiments that run it."""

    dictionaries: Mapping[Site, Sae]
    edges: pd.DataFrame
    held_out: HeldOut
    open_model: Callable[[], LanguageModel]
    contexts: Callable[[LanguageModel, int], Contexts]
    progress: Progress = silent

    def shelf(self) -> Shelf:
        """Dictionaries with their codes of the held-out tokens, a few kept."""
        return Shelf(dictionaries=self.dictionaries, held_out=self.held_out)

    def pair(self, source: Site, target: Site, *, half: int | None = None) -> PairData:
        """Two dictionaries and activations to match them by: of all held-out tokens, or of the
        first (0) or second (1) half of every batch, so that one half can judge what the other
        chose."""
        return pair_data(self.dictionaries, self.held_out, source, target, half=half)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an experiment found. `draw` writes the figure; `text` says what the paper saw and what
    this model shows."""

    tables: Mapping[str, pd.DataFrame]
    draw: Callable[[Path], None]
    text: str
    summary: Mapping[str, Any] = field(default_factory=dict)


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


def pair_data(
    dictionaries: Mapping[Site, Sae],
    held_out: HeldOut,
    source: Site,
    target: Site,
    *,
    half: int | None = None,
) -> PairData:
    """Two dictionaries and held-out activations to match them by; `half` as in `Subject.pair`."""
    left, right = dictionaries[source], dictionaries[target]
    return PairData(
        source=left,
        target=right,
        rows=lambda: _rows(held_out, source, target, half),
        n_candidates=_candidates(left, right),
    )


def layers_of(subject: Subject) -> list[Layer]:
    """Every residual site that something is linked to, in order of depth."""
    first = subject.edges[subject.edges["rank"] == 0]
    layers = []
    for name, group in first.groupby(first["target_site"].astype(str), sort=False):
        target = parse_site(str(name))
        n = subject.dictionaries[target].n_latents
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


def iter_activities(subject: Subject) -> Iterator[tuple[Layer, Activity]]:
    """The activity groups of every layer on the held-out tokens."""
    shelf, layers = subject.shelf(), layers_of(subject)
    for done, layer in enumerate(layers):
        subject.progress("group firings", done, len(layers))
        before = {
            relation: Predecessors(codes=_codes(shelf, link.source), best=link.best)
            for relation, link in layer.links.items()
        }
        yield layer, activity_groups(_codes(shelf, layer.target), before)
    subject.progress("group firings", len(layers), len(layers))


def _codes(shelf: Shelf, site: Site) -> Any:
    codes = shelf.at(site).codes
    if codes is None:
        raise UserError("experiments need held-out activations", where=site.short)
    return codes


def _best_link(edges: pd.DataFrame, n: int) -> BestLink:
    best, score = np.full(n, -1, dtype=np.int64), np.full(n, np.nan)
    latent = edges["target_latent"].to_numpy()
    best[latent], score[latent] = edges["source_latent"].to_numpy(), edges["cosine"].to_numpy()
    return BestLink(source=parse_site(str(edges["source_site"].iloc[0])), best=best, score=score)


def _rows(
    held_out: HeldOut, source: Site, target: Site, half: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for left, right in zip(held_out(source), held_out(target), strict=True):
        middle = (len(left) + 1) // 2
        part = slice(None) if half is None else slice(middle) if half == 0 else slice(middle, None)
        if len(left[part]):
            yield left[part], right[part]


def _candidates(source: Sae, target: Sae) -> int | None:
    """Wide dictionaries are assigned among candidates: the dense problem takes minutes from about
    8k latents."""
    return 64 if max(source.n_latents, target.n_latents) > 8192 else None
