"""Firing features of one layer, their active predecessors, and what the model does when those are
rescaled together.

1. One undisturbed run records the layer's predecessors and the layer; firings are drawn at random,
   as many from every activity group as there are, up to a limit.
2. A change multiplies some predecessors of a firing by r, on the token of the firing only: h ← h +
   (r − 1) a v, with a the predecessor's activation in the undisturbed run and v its decoder row.
   The dictionaries' errors stay in h.
3. The model goes on from the layer below; the target's activation is read again, and if wanted the
   context's loss.

Several predecessors (residual, MLP, attention) are changed in the same run. Cost: one context from
the layer below up to the target per change; to the end when the loss is read. Source: Feature Flow
§5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from pipeline.flow.activity import GROUPS, Predecessors, activity_groups
from pipeline.flow.causal import Contexts, record_clean
from pipeline.flow.functional import Codes, encode_tokens
from pipeline.flow.pairing import Relation
from pipeline.lenses.paper.subject import Layer, Subject
from sae import Sae


@dataclass(frozen=True, kw_only=True)
class Firings:
    """Drawn firings: where each is, its activation, its group, and by relation its predecessor and
    that one's activation there (0: silent)."""

    context: Int64[np.ndarray, "firing"]
    position: Int64[np.ndarray, "firing"]
    latent: Int64[np.ndarray, "firing"]
    before: Float[np.ndarray, "firing"]
    group: Int64[np.ndarray, "firing"]
    predecessor: Mapping[Relation, Int64[np.ndarray, "firing"]]
    strength: Mapping[Relation, Float[np.ndarray, "firing"]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one firing: the relations whose predecessor is rescaled, and by how much."""

    firing: int
    relations: tuple[Relation, ...]
    scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What each change did: the target's activation, and the context's mean loss (nan where it was
    not read)."""

    after: Float[np.ndarray, "change"]
    loss: Float[np.ndarray, "change"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A layer ready to be tested: the model, its dictionaries, the undisturbed run."""

    model: LanguageModel
    layer: Layer
    saes: Mapping[Site, Sae]
    contexts: Contexts
    recorded: Mapping[Site, Float[Tensor, "context position d_model"]]

    @property
    def start(self) -> Site:
        return start_of(self.layer)


def can_be_tested(layer: Layer) -> bool:
    """Whether the model can go on from a stream below all predecessors: the layer's residual
    predecessor."""
    link = layer.links.get("residual")
    return link is not None and link.source.kind == "resid_post"


def start_of(layer: Layer) -> Site:
    """The stream that changed runs go on from. Raises UserError for a layer without a residual
    predecessor."""
    if not can_be_tested(layer):
        raise UserError(
            "this layer has no residual predecessor to go on from", where=layer.target.short
        )
    return layer.links["residual"].source


def prepare(subject: Subject, model: LanguageModel, layer: Layer, contexts: Contexts) -> Stage:
    """Run the model once, undisturbed, over all contexts."""
    start = start_of(layer)
    sites = tuple(
        dict.fromkeys((start, *(link.source for link in layer.links.values()), layer.target))
    )
    return Stage(
        model=model,
        layer=layer,
        saes={site: subject.dictionaries[site] for site in sites},
        contexts=contexts,
        recorded=record_clean(model, contexts, sites, progress=subject.progress),
    )


def draw_firings(stage: Stage, *, n_per_group: int, rng: np.random.Generator) -> Firings:
    """Firings on usable tokens, in random order, at most `n_per_group` of each group; one feature a
    token."""
    codes = {site: _codes(stage, site) for site in stage.recorded}
    target, links = codes[stage.layer.target], stage.layer.links
    activity = activity_groups(
        target,
        {
            name: Predecessors(codes=codes[link.source], best=link.best)
            for name, link in links.items()
        },
    )
    order = rng.permutation(np.flatnonzero(stage.contexts.usable.ravel()[activity.token]))
    order = order[np.sort(np.unique(activity.token[order], return_index=True)[1])]
    chosen = np.concatenate(
        [order[activity.group[order] == group][:n_per_group] for group in range(len(GROUPS))]
    )
    latent, token = activity.latent[chosen], activity.token[chosen]
    length = stage.contexts.ids.shape[1]
    best = {name: link.best[latent] for name, link in links.items()}
    return Firings(
        context=token // length,
        position=token % length,
        latent=latent,
        before=_at(target, token, latent),
        group=activity.group[chosen],
        predecessor=best,
        strength={name: _at(codes[links[name].source], token, best[name]) for name in links},
    )


def run_changes(
    stage: Stage,
    firings: Firings,
    changes: Sequence[Change],
    *,
    with_loss: bool = False,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Outcome:
    """The model, changed, once for each of `changes`."""
    after, loss = np.zeros(len(changes)), np.full(len(changes), np.nan)
    # rows of one batch end at about the same position, so little is computed beyond what is read
    order = sorted(range(len(changes)), key=lambda i: firings.position[changes[i].firing])
    label = f"rescale before {stage.layer.target.short}"
    for done in range(0, len(order), batch_size):
        progress(label, done, len(order))
        batch = order[done : done + batch_size]
        part = [changes[i] for i in batch]
        at = np.array([change.firing for change in part])
        deltas = _deltas(stage, firings, part)
        value, losses = _rerun(stage, firings.context[at], firings.position[at], deltas, with_loss)
        codes = stage.saes[stage.layer.target].encode_sparse(value)
        matches = codes.index == torch.from_numpy(firings.latent[at])[:, None].to(
            codes.index.device
        )
        after[batch] = (codes.value * matches).sum(-1).cpu().numpy()
        loss[batch] = losses
    progress(label, len(order), len(order))
    return Outcome(after=after, loss=loss)


def clean_losses(stage: Stage, batch_size: int = 8) -> Float[np.ndarray, "context"]:
    """Mean next-token loss of every context, undisturbed."""
    ids = torch.from_numpy(stage.contexts.ids)
    return np.concatenate(
        [_mean_loss(stage.model.logits(part), part) for part in ids.split(batch_size)]
    )


def _codes(stage: Stage, site: Site) -> Codes:
    rows = stage.recorded[site]
    return encode_tokens(stage.saes[site], rows.reshape(-1, rows.shape[-1]).split(2048))


def _at(
    codes: Codes, token: Int64[np.ndarray, "place"], latent: Int64[np.ndarray, "place"]
) -> np.ndarray:
    """The activation of each latent on its token; 0 for latent -1."""
    if not len(token):
        return np.zeros(0)
    value = np.asarray(codes.codes[token, np.maximum(latent, 0)]).ravel().astype(np.float64)
    return np.where(latent >= 0, value, 0.0)


def _deltas(
    stage: Stage, firings: Firings, changes: Sequence[Change]
) -> dict[Site, Float[Tensor, "change d_model"]]:
    """What is added at each predecessor's site, for each change."""
    deltas = {}
    for relation, link in stage.layer.links.items():
        sae = stage.saes[link.source]
        at = np.array([change.firing for change in changes])
        weight = np.array(
            [change.scale - 1.0 if relation in change.relations else 0.0 for change in changes]
        )
        amount = torch.from_numpy(weight * firings.strength[relation][at]).to(sae.W_dec)
        latent = torch.from_numpy(np.maximum(firings.predecessor[relation][at], 0)).to(sae.device)
        deltas[link.source] = amount[:, None] * sae.W_dec[latent]
    return deltas


def _rerun(
    stage: Stage,
    context: np.ndarray,
    position: np.ndarray,
    deltas: Mapping[Site, Tensor],
    with_loss: bool,
) -> tuple[Float[Tensor, "change d_model"], np.ndarray]:
    """The target site's activation at each row's token and, if wanted, each row's loss."""
    length = stage.contexts.ids.shape[1] if with_loss else int(position.max()) + 1
    ids = torch.from_numpy(stage.contexts.ids[context, :length])
    stream = stage.recorded[stage.start][torch.from_numpy(context), :length]
    rows, at = torch.arange(len(context)), torch.from_numpy(position)
    target, model = stage.layer.target, stage.model

    def adding(delta: Tensor) -> Callable[[Tensor], Tensor]:
        def add(value: Tensor) -> Tensor:
            edited = value.clone()
            edited[rows, at] += delta.to(edited.device, edited.dtype)
            return edited

        return add

    edits = {site: adding(delta) for site, delta in deltas.items()}
    with continued_from(model, stage.start.layer, stream), model.edited(edits):
        if not with_loss:
            return model.activations(ids, (target,))[target][rows, at].float(), np.full(
                len(context), np.nan
            )
        with model.recorded((target,)) as seen:
            loss = _mean_loss(model.logits(ids), ids)
        return seen[target][rows, at].float(), loss


def _mean_loss(
    logits: Float[Tensor, "batch position vocab"], ids: Tensor
) -> Float[np.ndarray, "batch"]:
    wanted = ids[:, 1:].to(logits.device)
    return (
        F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none")
        .mean(1)
        .cpu()
        .numpy()
    )
