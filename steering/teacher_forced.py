"""Teacher-forced measures: what steering does to the probability of texts that other people wrote.
Nothing is sampled.

1. `log_likelihoods`: mean log p a token of each text, under the model as it is (steered or not).
2. `selectivity`: S = ΔLL(topic) − ΔLL(contrast), where Δ is steered minus unsteered and the
   contrast is text of the same register about other things. General damage cancels; what is left is
   the topic.
3. `output_score`: on neutral text, the probability of a set of tokens, and how much of the KL goes
   into moving probability between the set and the rest: KL = KL_between + disruption,
   on-target share = KL_between / KL.
4. `expected_share`: the probability that a token drawn under the real sampling rule is one of a
   set. Mean log-probabilities rise where words stay out of reach; this counts only what is said.

Cost: one forward pass over the texts per steering. Sources: Arad et al. (output scores); ActAdd
(effectiveness, disruption); the chain rule of KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site
from steering.dose import NeutralText, steered_log_probs
from steering.generation import COLDEST, Sampling
from steering.hooks import applied
from steering.plan import Plan
from steering.sequences import (
    Dictionary,
    SteerableModel,
    device_of,
    encoded,
    forward,
    in_batches,
    padded,
)

_RARE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Selectivity:
    """Mean changes of log p a token on topical and contrast texts; per text in `topic` and
    `contrast`."""

    topic: tuple[float, ...]
    contrast: tuple[float, ...]

    @property
    def score(self) -> float:
        return _mean(self.topic) - _mean(self.contrast)


@dataclass(frozen=True, kw_only=True)
class OutputScore:
    """Probability of a set of tokens unsteered and steered, mean over positions; the KL of the
    steered from the unsteered output, and the part of it between these and other tokens, nats a
    token."""

    before: float
    after: float
    kl: float
    kl_between: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def on_target_share(self) -> float:
        """Of the KL; negative when the tokens become less likely."""
        return math.copysign(self.kl_between, self.gain) / self.kl if self.kl > 0 else 0.0


def log_likelihoods(
    model: SteerableModel,
    texts: Sequence[str],
    *,
    n_tokens: int = 48,
    prefix: str = "",
    batch_size: int = 32,
) -> list[float]:
    """Mean log p a token of each text behind `prefix`, whose tokens are not scored. Edits in force
    apply."""
    if not texts:
        raise UserError("no texts to score", expected="at least one")
    skipped = len(encoded(model, prefix)) if prefix else 1
    rows = [
        encoded(model, f"{prefix} {text}" if prefix else text)[: skipped + n_tokens]
        for text in texts
    ]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found = [0.0] * len(rows)
    for block in in_batches(order, batch_size):
        for place, value in zip(
            block, _scores(model, [rows[p] for p in block], skipped), strict=True
        ):
            found[place] = value
    return found


def selectivity(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plan: Plan,
    topic_texts: Sequence[str],
    contrast_texts: Sequence[str],
    *,
    unsteered: Sequence[float] | None = None,
    prefix: str = "",
    n_tokens: int = 48,
) -> Selectivity:
    """Changes on both sets of texts. `unsteered` may give the log-likelihoods of topic + contrast,
    to save a pass."""
    texts = [*topic_texts, *contrast_texts]
    before = unsteered or log_likelihoods(model, texts, prefix=prefix, n_tokens=n_tokens)
    with applied(model, saes, plan):
        after = log_likelihoods(model, texts, prefix=prefix, n_tokens=n_tokens)
    change = [b - a for a, b in zip(before, after, strict=True)]
    return Selectivity(
        topic=tuple(change[: len(topic_texts)]), contrast=tuple(change[len(topic_texts) :])
    )


def output_score(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plan: Plan,
    tokens: Sequence[int],
    neutral: NeutralText,
) -> OutputScore:
    """What a plan does to the probability of `tokens`, over all positions of neutral text: after a
    prompt alone, few nouns could come next whatever is pushed."""
    base, steered = neutral.log_probs, steered_log_probs(model, saes, plan, neutral)
    before, after = (
        each[:, list(tokens)].exp().sum(-1).double().clamp(_RARE, 1 - _RARE)
        for each in (base, steered)
    )
    between = after * (after / before).log() + (1 - after) * ((1 - after) / (1 - before)).log()
    return OutputScore(
        before=float(before.mean()),
        after=float(after.mean()),
        kl=float(torch.linalg.vecdot(steered.exp(), steered - base).double().clamp(min=0).mean()),
        kl_between=float(between.mean()),
    )


def expected_share(
    log_probs: Float[Tensor, "token vocab"], tokens: Sequence[int], sampling: Sampling
) -> Float[Tensor, "token"]:
    """After every token, the probability that the next one drawn under the sampling rule is one of
    `tokens`. × 100: expected words of 100."""
    wanted = torch.zeros(log_probs.shape[-1], device=log_probs.device)
    wanted[list(tokens)] = 1.0
    found = []
    for block in log_probs.split(1024):
        top, index = (block / max(sampling.temperature, COLDEST)).topk(
            min(sampling.top_k, block.shape[-1]), dim=-1
        )
        p = top.softmax(-1)
        p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)
        found.append((p * wanted[index]).sum(-1) / p.sum(-1))
    return torch.cat(found)


def lexicon_tokens(model: SteerableModel, words: Sequence[str] | frozenset[str]) -> list[int]:
    """Token ids of the words that are one token, with a space before, capitalised or not."""
    forms = {form for word in words for form in (f" {word}", f" {word.capitalize()}")}
    ids = (model.tokenizer.encode(form) for form in sorted(forms))
    return sorted({found[0] for found in map(list, ids) if len(found) == 1})


def _scores(model: SteerableModel, rows: Sequence[Sequence[int]], skipped: int) -> list[float]:
    batch = padded(rows, device=device_of(model))
    logits = forward(model, batch)[:, :-1]
    chosen = logits.gather(2, batch.ids[:, 1:, None]).squeeze(2).float()
    log_probs = chosen - torch.stack([row.float().logsumexp(-1) for row in logits])
    scored = (batch.real & (batch.positions() >= skipped))[:, 1:]
    total = torch.where(scored, log_probs, 0.0).sum(-1)
    return (total / scored.sum(-1).clamp(min=1)).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
