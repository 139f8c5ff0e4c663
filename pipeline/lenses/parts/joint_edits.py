"""Active features of one layer, their active predecessors, and what the model does when those are
rescaled together.

1. One undisturbed run records the layer's predecessors and the layer; cases (a feature that is
   active on a token) are drawn at random, as many from every activity group as there are, up to a
   limit.
2. A change multiplies some predecessors of a case by r, on the case's token only: h ← h + (r − 1) a
   v, with a the predecessor's activation in the undisturbed run and v its decoder row. The SAEs'
   errors stay in h.
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
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from pipeline.flow.activity import GROUPS, Activity, Predecessors, activity_groups
from pipeline.flow.causal import Contexts, mean_with_interval, record_clean
from pipeline.flow.functional import Codes, encode_tokens
from pipeline.flow.pairing import Relation
from pipeline.lenses.parts.layers import Layer, contexts_of, fullest, layers_of, spread
from pipeline.run import Run
from sae import Sae

SHORT: dict[Relation, str] = {"residual": "RES", "mlp": "MLP", "attention": "ATT"}


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Drawn cases: where each is, its activation, its group, and by relation its predecessor and
    that one's activation there (0: silent)."""

    context: Int64[np.ndarray, "case"]
    position: Int64[np.ndarray, "case"]
    latent: Int64[np.ndarray, "case"]
    before: Float[np.ndarray, "case"]
    group: Int64[np.ndarray, "case"]
    predecessor: Mapping[Relation, Int64[np.ndarray, "case"]]
    strength: Mapping[Relation, Float[np.ndarray, "case"]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of one case: the relations whose predecessor is rescaled, and by how much."""

    case: int
    relations: tuple[Relation, ...]
    scale: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A layer ready to be tested: the model, its SAEs, the undisturbed run, and the codes of it."""

    model: LanguageModel
    layer: Layer
    saes: Mapping[Site, Sae]
    contexts: Contexts
    recorded: Mapping[Site, Float[Tensor, "context position d_model"]]
    codes: Mapping[Site, Codes]

    @property
    def start(self) -> Site:
        """The stream that changed runs go on from."""
        return self.layer.links["residual"].source

    @property
    def activity(self) -> Activity:
        """The group of every active feature on the contexts."""
        before = {
            name: Predecessors(codes=self.codes[link.source], best=link.best)
            for name, link in self.layer.links.items()
        }
        return activity_groups(self.codes[self.layer.target], before)


def tested_layers(run: Run, n: int) -> list[Layer]:
    """Layers whose residual predecessor lies in a stream that the model can go on from, spread over
    the depth. Raises UserError when there are none."""
    layers = [
        layer
        for layer in layers_of(run)
        if (link := layer.links.get("residual")) and link.source.kind == "resid_post"
    ]
    if not layers:
        raise UserError(
            "no layer has a residual predecessor to go on from",
            fix="set collect.sites to resid_post",
        )
    return spread(fullest(layers), n)


def prepare(run: Run, layer: Layer, contexts: Contexts) -> Stage:
    """Run the model once, undisturbed, over all contexts."""
    start = layer.links["residual"].source
    sources = (start, *(link.source for link in layer.links.values()), layer.target)
    saes = {site: run.saes[site] for site in dict.fromkeys(sources)}
    recorded = record_clean(run.model, contexts, tuple(saes), progress=run.context.progress)
    codes = {
        site: encode_tokens(saes[site], rows.reshape(-1, rows.shape[-1]).split(2048))
        for site, rows in recorded.items()
    }
    return Stage(
        model=run.model, layer=layer, saes=saes, contexts=contexts, recorded=recorded, codes=codes
    )


def draw_cases(stage: Stage, *, n_per_group: int, rng: np.random.Generator) -> Cases:
    """Cases on usable tokens, in random order, at most `n_per_group` of each group; one feature a
    token."""
    activity, links = stage.activity, stage.layer.links
    order = rng.permutation(np.flatnonzero(stage.contexts.usable.ravel()[activity.token]))
    order = order[np.sort(np.unique(activity.token[order], return_index=True)[1])]
    chosen = np.concatenate(
        [order[activity.group[order] == group][:n_per_group] for group in range(len(GROUPS))]
    )
    latent, token = activity.latent[chosen], activity.token[chosen]
    length = stage.contexts.ids.shape[1]
    best = {name: link.best[latent] for name, link in links.items()}
    return Cases(
        context=token // length,
        position=token % length,
        latent=latent,
        before=_at(stage.codes[stage.layer.target], token, latent),
        group=activity.group[chosen],
        predecessor=best,
        strength={
            name: _at(stage.codes[link.source], token, best[name]) for name, link in links.items()
        },
    )


def run_changes(
    stage: Stage,
    cases: Cases,
    changes: Sequence[Change],
    *,
    with_loss: bool = False,
    batch_size: int = 32,
    progress: Progress = silent,
) -> tuple[Float[np.ndarray, "change"], Float[np.ndarray, "change"]]:
    """The model, changed, once for each of `changes`: the target's activation, and the context's
    mean loss (nan where it was not read)."""
    after, loss = np.zeros(len(changes)), np.full(len(changes), np.nan)
    # rows of one batch end at about the same position, so little is computed beyond what is read
    order = sorted(range(len(changes)), key=lambda i: cases.position[changes[i].case])
    label = f"rescale before {stage.layer.target.short}"
    for done in range(0, len(order), batch_size):
        progress(label, done, len(order))
        batch = order[done : done + batch_size]
        part = [changes[i] for i in batch]
        at = np.array([change.case for change in part])
        deltas = _deltas(stage, cases, part)
        value, losses = _rerun(stage, cases.context[at], cases.position[at], deltas, with_loss)
        codes = stage.saes[stage.layer.target].encode_sparse(value)
        matches = codes.index == torch.from_numpy(cases.latent[at])[:, None].to(codes.index.device)
        after[batch] = (codes.value * matches).sum(-1).cpu().numpy()
        loss[batch] = losses
    progress(label, len(order), len(order))
    return after, loss


def clean_losses(stage: Stage) -> Float[np.ndarray, "context"]:
    """Mean next-token loss of every context, undisturbed."""
    ids = torch.from_numpy(stage.contexts.ids)
    return np.concatenate([_mean_loss(stage.model.logits(part), part) for part in ids.split(8)])


def changed_trials(
    run: Run,
    changes_of: Callable[[Cases], list[Change]],
    *,
    n_pairs: int,
    n_targets: int,
    n_contexts: int,
    seed: int,
    with_loss: bool,
) -> pd.DataFrame:
    """One row a change, over the tested layers; `changes_of` lists the changes of some cases."""
    contexts = contexts_of(run, n_contexts)
    tables = []
    for layer in tested_layers(run, n_pairs):
        stage = prepare(run, layer, contexts)
        rng = np.random.default_rng([seed, layer.target.layer])
        cases = draw_cases(stage, n_per_group=max(1, n_targets // (len(GROUPS) - 1)), rng=rng)
        changes = changes_of(cases)
        after, loss = run_changes(
            stage,
            cases,
            changes,
            with_loss=with_loss,
            batch_size=8 if with_loss else 32,
            progress=run.context.progress,
        )
        table = _as_table(stage, cases, changes, after)
        if with_loss:
            clean = clean_losses(stage)[table["context"]]
            table["loss_change"] = (loss - clean) / clean
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def means_by(
    trials: pd.DataFrame, by: Sequence[str], columns: Sequence[str], seed: int
) -> pd.DataFrame:
    """Means of some columns by group, with intervals over documents."""
    rows = []
    for key, part in trials.groupby(list(by)):
        row = dict(zip(by, key, strict=True)) | {"n": len(part)}
        for column in columns:
            row |= mean_with_interval(part, column, 1000, seed)
        rows.append(row)
    bounds = [name + suffix for name in columns for suffix in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=[*by, "n", *bounds])


def _as_table(
    stage: Stage, cases: Cases, changes: Sequence[Change], after: np.ndarray
) -> pd.DataFrame:
    at = np.array([change.case for change in changes], dtype=np.int64)
    context, position = cases.context[at], cases.position[at]
    before = cases.before[at]
    return pd.DataFrame(
        {
            "target_site": stage.layer.target.short,
            "group": np.array(GROUPS)[cases.group[at]],
            "removed": ["&".join(SHORT[name] for name in change.relations) for change in changes],
            "scale": [change.scale for change in changes],
            "document": stage.contexts.document[context, position],
            "context": context,
            "position": position,
            "target_latent": cases.latent[at],
            "before": before,
            "after": after,
            "change": 1.0 - after / before,
            "success": after <= 0.0,
        }
    )


def _at(
    codes: Codes, token: Int64[np.ndarray, "place"], latent: Int64[np.ndarray, "place"]
) -> np.ndarray:
    """The activation of each latent on its token; 0 for latent -1."""
    if not len(token):
        return np.zeros(0)
    value = np.asarray(codes.codes[token, np.maximum(latent, 0)]).ravel().astype(np.float64)
    return np.where(latent >= 0, value, 0.0)


def _deltas(
    stage: Stage, cases: Cases, changes: Sequence[Change]
) -> dict[Site, Float[Tensor, "change d_model"]]:
    """What is added at each predecessor's site, for each change."""
    deltas = {}
    at = np.array([change.case for change in changes])
    for relation, link in stage.layer.links.items():
        sae = stage.saes[link.source]
        weight = np.array(
            [change.scale - 1.0 if relation in change.relations else 0.0 for change in changes]
        )
        amount = torch.from_numpy(weight * cases.strength[relation][at]).to(sae.W_dec)
        latent = torch.from_numpy(np.maximum(cases.predecessor[relation][at], 0)).to(sae.device)
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
            value = model.activations(ids, (target,))[target][rows, at]
            return value.float(), np.full(len(context), np.nan)
        with model.recorded((target,)) as seen:
            loss = _mean_loss(model.logits(ids), ids)
        return seen[target][rows, at].float(), loss


def _mean_loss(
    logits: Float[Tensor, "batch position vocab"], ids: Tensor
) -> Float[np.ndarray, "batch"]:
    wanted = ids[:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none")
    return losses.mean(1).cpu().numpy()
