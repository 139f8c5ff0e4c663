"""A prompt with some features of one token changed: set to a multiple of their value, or to the
value they have in another prompt, and what the model says then.

1. Values are read where the features lie, in the prompt (and in the other one on the token where
   they are strongest together).
2. The prompt runs with the values set at every site; what is set is the running value, as in
   `pipeline.trace.stream.edited`.
3. Both texts go on greedily, the edit in force on its token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, parse_feature
from pipeline.trace.prompt import ids_of
from pipeline.trace.stream import edits_of, run_model
from steering.edits import Ablate, Clamp
from steering.plan import Node, Plan
from steering.plan_files import plan_document

if TYPE_CHECKING:
    from pipeline.run import Run

_N_TOP = 5


@torch.no_grad()
def edit_prompt(
    run: Run,
    prompt: str,
    features: Sequence[str],
    token: int,
    *,
    factor: float = 0.0,
    other: str | None = None,
    chat: bool = False,
    n_new_tokens: int = 16,
) -> dict[str, Any]:
    """`before` and `after` (the likeliest next tokens), `kl` between them, and the `text` that
    follows. Raises UserError for features and tokens that there are not."""
    model = run.exact_model
    nodes = _nodes(run, ids_of(model, prompt, chat), features, token)
    nodes["to"] = factor * nodes["z"] if other is None else _values(run, other, features, chat)
    ids = ids_of(model, prompt, chat)
    edits = edits_of(run.saes, [nodes.iloc[:0], nodes])
    rows, first = [list(ids), list(ids)], None
    for _ in range(n_new_tokens):
        logits = run_model(model, rows, edits)
        first = logits if first is None else first
        for row, best in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.append(best)
    before, after = (first if first is not None else run_model(model, rows, edits)).log_softmax(-1)
    return {
        "before": _top(model, before),
        "after": _top(model, after),
        "kl": float((before.exp() * (before - after)).sum()),
        "text": model.tokenizer.decode(rows[1][len(ids) :]),
        "text_before": model.tokenizer.decode(rows[0][len(ids) :]),
    }


def plan_of(
    run: Run, prompt: str, features: Sequence[str], token: int, *, factor: float, chat: bool = False
) -> Plan:
    """The same change as a steering plan, for all tokens of any text: features are ablated, or
    clamped to the multiple of their value in the prompt. Raises UserError."""
    nodes = _nodes(run, ids_of(run.exact_model, prompt, chat), features, token)
    nodes = nodes[nodes["z"] > 0]
    if nodes.empty:
        raise UserError("no feature of these is active there", found=", ".join(features))
    scale = [1.0] * len(nodes) if factor == 0 else (factor * nodes["z"]).tolist()
    ids = nodes["cut"] + "/" + nodes["latent"].astype(str)
    made = Plan(
        nodes=tuple(Node(at=i, scale=s) for i, s in zip(ids, scale, strict=True)),
        edit=Ablate() if factor == 0 else Clamp(),
        name=f"trace ×{factor:g}",
        note=f"from a trace of {prompt!r}, token {token}",
    )
    return run.steering.signed(made)


def plan_json(plan: Plan) -> str:
    """A plan file as text, for `featureflow steer`."""
    return json.dumps(plan_document(plan), indent=1, ensure_ascii=False) + "\n"


def _nodes(run: Run, ids: Sequence[int], features: Sequence[str], token: int) -> pd.DataFrame:
    if not 0 < token < len(ids):
        raise UserError("no token of the prompt", found=str(token), expected=f"1 … {len(ids) - 1}")
    return pd.DataFrame([_at(run, ids, feature, token) for feature in _known(run, features)])


def _at(run: Run, ids: Sequence[int], feature: FeatureId, token: int) -> dict[str, Any]:
    z, pre = _codes(run, ids, feature)
    value = float(z[token])
    return {
        "cut": feature.site.short,
        "token": token,
        "latent": feature.latent,
        "z": value,
        "pre": float(pre[token]) if value else 1.0,
    }


def _values(run: Run, prompt: str, features: Sequence[str], chat: bool) -> list[float]:
    """The features' values on the token of a prompt where their sum is largest."""
    ids = ids_of(run.exact_model, prompt, chat)
    z = torch.stack([_codes(run, ids, feature)[0] for feature in _known(run, features)])
    z[:, 0] = 0  # the start token is a sink
    return z[:, z.sum(0).argmax()].tolist()


def _codes(run: Run, ids: Sequence[int], feature: FeatureId) -> tuple[torch.Tensor, torch.Tensor]:
    """A feature's activation and pre-activation on every token."""
    site, latent = feature.site, feature.latent
    h = run.exact_model.activations(torch.tensor([list(ids)]), [site])[site][0].float()
    sae = run.saes[site]
    return sae.encode(h)[:, latent], sae.pre_activations(h)[:, latent]


def _known(run: Run, features: Sequence[str]) -> list[FeatureId]:
    found = [parse_feature(feature) for feature in features]
    wrong = [f for f in found if f.site not in run.saes or f.latent >= run.saes[f.site].n_latents]
    if wrong or not found:
        raise UserError("the run has no such features", found=", ".join(map(str, wrong)) or "none")
    return found


def _top(model: Any, log_probs: torch.Tensor) -> list[list[Any]]:
    value, token = log_probs.exp().topk(min(_N_TOP, len(log_probs)))
    pairs = zip(token.tolist(), value.tolist(), strict=True)
    return [[model.tokenizer.token_text(t), round(p, 5)] for t, p in pairs]
