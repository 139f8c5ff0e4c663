"""Two dictionaries → an operator that carries latents of one layer to the next, and how well it
does.

1. An operator is a sparse matrix of source × target. `TopK`: each latent's k best partners by inner
   product of decoder and encoder rows, positive only, weight 1 (the paper's indicator) or the inner
   product itself. `Permutation`: SAE Match's one-to-one assignment.
2. Folding scales activations by the ratio of the two latents' scales: JumpReLU thresholds, or where
   there are none the mean activation where it is active. z_target = (z_source / scale_source) T ·
   scale_target.
3. Encode – carry – decode: source latents, the operator, the target's decoder. Because all three
   after the encoder are linear, they are one dictionary with the source's encoder (`skipping`).
4. Measures: explained variance of the target's activations; cross-entropy when the model goes on
   with them, so that the layers between are skipped; matching score, the share of activations whose
   partner is active too.

Cost: one product of latent × latent to find partners, then that of encoding. Sources: Feature Flow
(arXiv 2502.03032) §3.2 and App. F; SAE Match (arXiv 2410.07656) §4, whose printed formula of
explained variance is the unexplained share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, assert_never

import numpy as np
import pandas as pd
import scipy.sparse as sparse
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from pipeline.flow.assignment import Objective, assign, folded
from pipeline.flow.causal import Contexts
from pipeline.flow.functional import Codes
from pipeline.flow.match import full_precision
from sae import Sae
from sae.activations import Threshold

Weights = Literal["dec-dec", "enc-enc", "dec-enc", "dec-dec+enc-enc"]
WEIGHTS: tuple[Weights, ...] = ("dec-dec", "enc-enc", "dec-enc", "dec-dec+enc-enc")
_BLOCK_ROWS = 512
Given = TypeVar("Given")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Partners by similarity. `of` says whose best partners are taken: each source's (the operator
    of the paper) or each target's (its predecessors). With `indicator` every kept entry counts 1.
    `fold` folds before comparing."""

    k: int = 1
    weights: Weights = "dec-dec"
    of: Literal["source", "target"] = "source"
    indicator: bool = True
    fold: bool = False
    kind: Literal["top-k"] = "top-k"


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """SAE Match's assignment; `n_candidates` makes it sparse."""

    objective: Objective = "decoder"
    fold: bool = False
    n_candidates: int | None = None
    kind: Literal["permutation"] = "permutation"


Choice = TopK | Permutation


def operator(source: Sae, target: Sae, choice: Choice) -> sparse.csr_matrix:
    """The matrix T of source × target latents with z_target = z_source T. Raises UserError."""
    match choice:
        case TopK():
            return _top_k(source, target, choice)
        case Permutation(objective=objective, fold=fold, n_candidates=n):
            found = assign(source, target, objective=objective, fold=fold, n_candidates=n)
            matched = np.flatnonzero(found.target_of >= 0)
            ones = np.ones(len(matched), dtype=np.float32)
            shape = (source.n_latents, target.n_latents)
            return sparse.csr_matrix((ones, (matched, found.target_of[matched])), shape=shape)
        case _:
            assert_never(choice)


def scale_of(sae: Sae, codes: Codes | None = None) -> Float[np.ndarray, "latent"]:
    """The typical size of each latent: its threshold, else its mean activation on the tokens where
    it was active, else 1."""
    if isinstance(sae.activation, Threshold):
        scale = sae.activation.theta.detach().cpu().double().numpy()
    elif codes is not None:
        scale = codes.mean * codes.n_tokens / np.maximum(codes.n_fired, 1)
    else:
        scale = np.ones(sae.n_latents)
    return np.where(scale > 0, scale, 1.0)


def rescaled(
    matrix: sparse.csr_matrix,
    source_scale: Float[np.ndarray, "source"],
    target_scale: Float[np.ndarray, "target"],
) -> sparse.csr_matrix:
    """The operator between folded dictionaries, written for unfolded latents."""
    return (sparse.diags(1.0 / source_scale) @ matrix @ sparse.diags(target_scale)).tocsr()


def skipping(source: Sae, target: Sae, matrix: sparse.csr_matrix) -> Sae:
    """Encode with the source, carry by `matrix`, decode with the target: one dictionary from the
    source's activations to the target's. Raises UserError when the operator is of other widths."""
    if matrix.shape != (source.n_latents, target.n_latents):
        raise UserError(
            "the operator does not fit the dictionaries",
            expected=f"{source.n_latents} × {target.n_latents}",
            found=" × ".join(map(str, matrix.shape)),
        )
    rows = matrix.astype(np.float32) @ target.W_dec.detach().float().cpu().numpy()
    return source.replace(
        W_dec=torch.from_numpy(np.ascontiguousarray(rows)).to(source.W_enc), b_dec=target.b_dec
    )


def explained_variance(
    predict: Callable[[Given], Float[Tensor, "token d_out"]],
    batches: Iterable[tuple[Given, Float[Tensor, "token d_out"]]],
) -> float:
    """1 − Σ‖x̂ − x‖² / Σ‖x − mean‖², in one pass; nan without variance. A batch holds what
    `predict` takes (source activations or their codes) and the target's activations of the same
    tokens."""
    error, square, n = 0.0, 0.0, 0
    total: Tensor | None = None
    for given, wanted in batches:
        x = wanted.double()
        error += float((predict(given).double() - x).square().sum())
        square += float(x.square().sum())
        total = x.sum(0) if total is None else total + x.sum(0)
        n += len(x)
    if total is None:
        return float("nan")
    variance = square - float(total.square().sum()) / n
    return 1.0 - error / variance if variance > 0 else float("nan")


@dataclass(frozen=True, kw_only=True)
class MatchingScore:
    """How often a carried latent finds its partner active: over all activations, and as a mean over
    latents that were active."""

    of_activations: float
    of_latents: float
    n_activations: int


def matching_score(matrix: sparse.csr_matrix, source: Codes, target: Codes) -> MatchingScore:
    """Probability that a partner is active where a source latent is, on the same tokens (SAE
    Match's matching score). With several partners, one of them is enough. Latents without a partner
    do not count."""
    partners = (matrix != 0).astype(np.int32).tocsr()
    carried = np.asarray(partners.sum(axis=1)).ravel() > 0
    on_source, on_target = (source.codes.astype(bool).tocsc(), target.codes.astype(bool).tocsc())
    hits = np.zeros(len(carried))
    for start in range(0, len(carried), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        reached = (on_target.astype(np.int32) @ partners[block].T).astype(bool)
        together = on_source[:, block].multiply(reached)
        hits[block] = np.asarray(together.sum(axis=0)).ravel()
    counted = carried & (source.n_fired > 0)
    n = int(source.n_fired[counted].sum())
    if not n:
        return MatchingScore(of_activations=float("nan"), of_latents=float("nan"), n_activations=0)
    share = hits[counted] / source.n_fired[counted]
    return MatchingScore(
        of_activations=float(hits[counted].sum() / n),
        of_latents=float(share.mean()),
        n_activations=n,
    )


def measure_skipping(
    model: LanguageModel,
    contexts: Contexts,
    *,
    source: Site,
    target: Site,
    predictors: Mapping[
        str, Callable[[Float[Tensor, "*token d_in"]], Float[Tensor, "*token d_out"]]
    ],
    batch_size: int = 4,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Next-token cross-entropy per context when the stream at `target` is what a predictor makes of
    `source`.

    One row per predictor and context: `predictor, document, context, n, ce, delta_ce`, means over
    next tokens of usable positions. Unusable positions (BOS, separators) keep their own
    activation."""
    rows = []
    ids_all, usable_all = torch.from_numpy(contexts.ids), torch.from_numpy(contexts.usable)
    for start in range(0, len(ids_all), batch_size):
        progress(f"skip {source.short} → {target.short}", start, len(ids_all))
        ids, usable = ids_all[start : start + batch_size], usable_all[start : start + batch_size]
        with model.recorded([source, target]) as seen:
            plain = _cross_entropy(model.logits(ids), ids, usable)
            clean = dict(seen)
        for name, predict in predictors.items():
            made = predict(clean[source]).to(clean[target])
            stream = torch.where(usable.to(made.device)[..., None], made, clean[target])
            spliced = _cross_entropy(_logits_with(model, ids, target, stream), ids, usable)
            for i, (ce, before) in enumerate(zip(spliced, plain, strict=True)):
                context = start + i
                rows.append(
                    {
                        "predictor": name,
                        "document": int(contexts.document[context, 0]),
                        "context": context,
                        "n": int(usable[i, :-1].sum()),
                        "ce": float(ce),
                        "delta_ce": float(ce - before),
                    }
                )
    return pd.DataFrame(rows)


def _logits_with(
    model: LanguageModel,
    ids: Int64[Tensor, "batch position"],
    target: Site,
    stream: Float[Tensor, "batch position d_model"],
) -> Float[Tensor, "batch position vocab"]:
    """Logits when the stream at `target` is `stream`; what lies below is not computed where that is
    possible."""
    if target.kind == "resid_post":
        with continued_from(model, target.layer, stream):
            return model.logits(ids)
    with model.edited({target: lambda value: stream.to(value)}):
        return model.logits(ids)


def _cross_entropy(
    logits: Float[Tensor, "batch position vocab"], ids: Tensor, usable: Tensor
) -> Tensor:
    """Mean over the next tokens of usable positions, one number a context."""
    loss = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none"
    )
    counted = usable[:, :-1].to(loss)
    return (loss * counted).sum(1).cpu() / counted.sum(1).clamp_min(1).cpu()


def _top_k(source: Sae, target: Sae, choice: TopK) -> sparse.csr_matrix:
    if choice.k < 1:
        raise UserError("an operator needs partners", expected="k >= 1", found=str(choice.k))
    terms = _terms(
        folded(source) if choice.fold else source,
        folded(target) if choice.fold else target,
        choice.weights,
    )
    if choice.of == "target":
        terms = [(right, left) for left, right in terms]
    row, column, value = _best_of(terms, choice.k)
    positive = value > 0
    weight = np.ones(int(positive.sum()), dtype=np.float32) if choice.indicator else value[positive]
    if choice.of == "target":
        row, column = column, row
    return sparse.csr_matrix(
        (weight, (row[positive], column[positive])), shape=(source.n_latents, target.n_latents)
    )


def _terms(source: Sae, target: Sae, weights: Weights) -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices whose products are summed to the similarity."""
    pairs = {
        "dec-dec": (source.W_dec, target.W_dec),
        "enc-enc": (source.W_enc, target.W_enc),
        "dec-enc": (source.W_dec, target.W_enc),
    }
    terms = [pairs[name] for name in weights.split("+")]
    for left, right in terms:
        if left.shape[1] != right.shape[1]:
            raise UserError(
                "dictionaries of different spaces cannot be compared",
                expected=f"rows of {left.shape[1]} numbers",
                found=f"rows of {right.shape[1]}",
            )
    return [(left.float(), right.float()) for left, right in terms]


def _best_of(
    terms: list[tuple[Tensor, Tensor]], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and similarity of the k best columns of every row, a block of rows at a time."""
    n_rows, n_columns = len(terms[0][0]), len(terms[0][1])
    rows, columns, values = [], [], []
    with full_precision(), torch.no_grad():
        for start in range(0, n_rows, _BLOCK_ROWS):
            block = slice(start, min(start + _BLOCK_ROWS, n_rows))
            similarity = sum(left[block] @ right.T for left, right in terms)
            value, index = torch.as_tensor(similarity).topk(min(k, n_columns), dim=1)
            rows.append(np.repeat(np.arange(block.start, block.stop), value.shape[1]))
            columns.append(index.cpu().numpy().ravel())
            values.append(value.cpu().numpy().ravel())
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
