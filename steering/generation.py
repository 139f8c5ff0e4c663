"""Generation: paired samples of text, steered and unsteered, from the same random numbers.

1. Every (prompt, sample) has a random stream of its own, seeded by (seed, prompt, sample) and
   nothing else: the same in every batch, for every plan. At each step it draws one Gumbel number a
   token of the vocabulary.
2. Rows = plans × prompts × samples, left-padded, with a key-value cache; plans are applied to their
   own rows, so a steered row and its paired unsteered samples run in one batch.
3. Next token = argmax(log p / temperature + Gumbel) over the `top_k` likeliest tokens, cut to
   `top_p`. Twins pick the same token until their distributions differ enough to matter.
4. Kept per token: its log-probability at temperature 1 under the model that wrote it.

`stream` yields after every token; `generate` collects. Cost: one forward pass of one token per row
a step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from steering.hooks import RowPlan, SteeringReport, applied
from steering.plan import Plan
from steering.sequences import (
    Batch,
    Dictionary,
    Prompt,
    SteerableModel,
    device_of,
    encoded,
    forward_arguments,
    in_batches,
    padded,
)

COLDEST = 1e-6
"""Below this temperature differences of logits leave float32; sampling is greedy there."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Temperature 0 takes the likeliest."""

    n_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 512
    stop_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.n_tokens < 1:
            problems.append(
                Problem(what="at least one token", where="n_tokens", found=str(self.n_tokens))
            )
        if not 0 <= self.temperature < math.inf:
            problems.append(
                Problem(what="0 or more", where="temperature", found=str(self.temperature))
            )
        if not 0 < self.top_p <= 1:
            problems.append(Problem(what="in (0, 1]", where="top_p", found=str(self.top_p)))
        if self.top_k < 1:
            problems.append(Problem(what="at least 1", where="top_k", found=str(self.top_k)))
        if problems:
            raise UserError("this is no way to sample", problems=tuple(problems))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A continuation. `plan` indexes the plans given (the prompt is not part of `text`); `finished`
    by a stop token."""

    plan: int
    prompt_index: int
    sample: int
    prompt: Prompt
    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Samples in the order plan, prompt, sample; `reports` one a batch."""

    samples: tuple[Sample, ...]
    reports: tuple[SteeringReport, ...]

    def of_plan(self, plan: int) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.plan == plan)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One new token for every row that is still being written; `top` has the likeliest tokens of
    each row with their log-probabilities, where they were asked for."""

    rows: tuple[int, ...]
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


def generate(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    prompts: Sequence[str],
    plans: Sequence[Plan | None],
    *,
    n_samples: int = 1,
    seed: int = 0,
    sampling: Sampling = Sampling(),  # frozen
    batch_size: int = 32,
    progress: Progress = silent,
) -> Generation:
    """Continue every prompt `n_samples` times under every plan (None: unsteered)."""
    rows = [
        _Row(plan=p, prompt_index=i, sample=s, prompt=prompt)
        for i, prompt in enumerate(prompts)
        for s in range(n_samples)
        for p in range(len(plans))
    ]
    if not rows:
        raise UserError("nothing to generate", expected="at least one prompt, plan and sample")
    samples, reports = [], []
    done = 0
    for block in in_batches(rows, batch_size):
        made, report = _generate_block(model, saes, block, plans, seed, sampling)
        samples += made
        reports.append(report)
        done += len(block)
        progress("generate", done, len(rows))
    samples.sort(key=lambda sample: (sample.plan, sample.prompt_index, sample.sample))
    return Generation(samples=tuple(samples), reports=tuple(reports))


def stream(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    prompt: Prompt,
    plans: Sequence[Plan | None],
    *,
    n_samples: int = 1,
    n_top: int = 0,
    seed: int = 0,
    sampling: Sampling = Sampling(),
    reports: list[SteeringReport] | None = None,
) -> Generator[Step, None, None]:
    """`n_samples` rows a plan, plan by plan, token by token; a row ends at a stop token. At the end
    `reports` gets what steering touched. The model is steered until then: close what is not
    exhausted."""
    rows = [
        _Row(plan=p, prompt_index=0, sample=s, prompt=prompt)
        for p in range(len(plans))
        for s in range(n_samples)
    ]
    reports = [] if reports is None else reports
    yield from _steps(model, saes, rows, plans, seed, sampling, reports, n_top)


@dataclass(frozen=True, kw_only=True)
class _Row:
    plan: int
    prompt_index: int
    sample: int
    prompt: Prompt


def _generate_block(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    rows: Sequence[_Row],
    plans: Sequence[Plan | None],
    seed: int,
    sampling: Sampling,
) -> tuple[list[Sample], SteeringReport]:
    ids: list[list[int]] = [[] for _ in rows]
    log_probs: list[list[float]] = [[] for _ in rows]
    reports: list[SteeringReport] = []
    for step in _steps(model, saes, rows, plans, seed, sampling, reports):
        for row, token, log_prob in zip(step.rows, step.ids, step.log_probs, strict=True):
            ids[row].append(token)
            log_probs[row].append(log_prob)
    samples = [
        _sample(model, row, tuple(tokens), tuple(values), sampling)
        for row, tokens, values in zip(rows, ids, log_probs, strict=True)
    ]
    return samples, reports[0]


def _sample(
    model: SteerableModel,
    row: _Row,
    ids: tuple[int, ...],
    log_probs: tuple[float, ...],
    sampling: Sampling,
) -> Sample:
    finished = bool(ids) and ids[-1] in stop_tokens(model, sampling)
    return Sample(
        plan=row.plan,
        prompt_index=row.prompt_index,
        sample=row.sample,
        prompt=row.prompt,
        text=model.tokenizer.decode(ids[:-1] if finished else ids),
        ids=ids,
        log_probs=log_probs,
        finished=finished,
    )


def _steps(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    rows: Sequence[_Row],
    plans: Sequence[Plan | None],
    seed: int,
    sampling: Sampling,
    reports: list[SteeringReport],
    n_top: int = 0,
) -> Iterator[Step]:
    device = device_of(model)
    batch = padded([encoded(model, row.prompt) for row in rows], device=device)
    _refuse_too_long(model, batch.ids.shape[1] + sampling.n_tokens)
    noise = _Noise([(row.prompt, row.sample) for row in rows], seed, model.d_vocab)
    stops = torch.tensor(sorted(stop_tokens(model, sampling)), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    steering, row_plans = ExitStack(), _row_plans(rows, plans)
    cache: Any = None
    with steering:
        run = steering.enter_context(applied(model, saes, row_plans)) if row_plans else None
        steering.callback(
            lambda: reports.append(run.report() if run else SteeringReport(nodes=(), n_passes=0))
        )
        for _ in range(sampling.n_tokens):
            logits, cache = _next_logits(model, batch, cache)
            all_log_probs = logits.float().log_softmax(-1)
            if all_log_probs[alive, 0].isnan().any():  # one NaN or infinity makes all of them NaN
                raise UserError(
                    "the model's answer is no number",
                    found="NaN or infinity among the logits",
                    fix="a smaller strength of the plan" if row_plans else None,
                )
            chosen = _choose(logits.float(), noise.next().to(device), sampling)
            kept = alive.nonzero().squeeze(1).tolist()
            yield Step(
                rows=tuple(kept),
                ids=tuple(chosen[alive].tolist()),
                log_probs=tuple(all_log_probs.gather(1, chosen[:, None])[alive, 0].tolist()),
                top=_likeliest(all_log_probs[alive], n_top),
            )
            alive = alive & ~torch.isin(chosen, stops)
            if not alive.any():
                break
            batch = _extended(batch, chosen)


def _next_logits(
    model: SteerableModel, batch: Batch, cache: Any
) -> tuple[Float[Tensor, "batch vocab"], Any]:
    """Logits after the last column. The cache holds every column but the new ones."""
    n_past = 0 if cache is None else cache.get_seq_length()
    arguments = forward_arguments(
        model, mask=batch.real, positions=batch.positions()[:, n_past:], n_last=1
    )
    with torch.no_grad():
        out = model.hf(
            input_ids=batch.ids[:, n_past:], past_key_values=cache, use_cache=True, **arguments
        )
    return out.logits[:, -1], out.past_key_values


def _choose(
    logits: Float[Tensor, "batch vocab"], noise: Float[Tensor, "batch vocab"], sampling: Sampling
) -> Int[Tensor, "batch"]:
    if sampling.temperature < COLDEST:
        return logits.argmax(-1)
    top, index = (logits / sampling.temperature).topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    probability = top.softmax(-1)
    before = probability.cumsum(-1) - probability
    scores = torch.where(before < sampling.top_p, top + noise.gather(1, index), -torch.inf)
    return index.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)


def _likeliest(
    log_probs: Float[Tensor, "batch vocab"], n: int
) -> tuple[tuple[tuple[int, float], ...], ...]:
    values, ids = log_probs.topk(min(n, log_probs.shape[-1]), dim=-1)
    return tuple(
        tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    )


class _Noise:
    """Gumbel numbers for each row; rows of one (prompt, sample) get the same ones, whatever else is
    in the batch."""

    def __init__(self, keys: Sequence[tuple[Prompt, int]], seed: int, d_vocab: int) -> None:
        unique = sorted(set(keys))
        self._generators = [
            torch.Generator().manual_seed(_stream_seed(seed, *key)) for key in unique
        ]
        self._rows = torch.tensor([unique.index(key) for key in keys])
        self._d_vocab = d_vocab

    def next(self) -> Float[Tensor, "batch vocab"]:
        drawn = torch.stack(
            [torch.rand(self._d_vocab, generator=generator) for generator in self._generators]
        )
        return -torch.log(-torch.log(drawn.clamp(1e-20, 1 - 1e-7)))[self._rows]


def _stream_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """Independent of the other prompts, of the batch and of Python's hash seed."""
    return int.from_bytes(
        hashlib.sha256(f"{seed}\0{prompt}\0{sample}".encode()).digest()[:7], "big"
    )


def _row_plans(rows: Sequence[_Row], plans: Sequence[Plan | None]) -> list[RowPlan]:
    by_plan: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_plan.setdefault(row.plan, []).append(place)
    listed = []
    for number, places in sorted(by_plan.items()):
        plan = plans[number]
        if plan is not None and plan.strength != 0:
            listed.append(
                RowPlan(plan=plan, rows=None if len(places) == len(rows) else tuple(places))
            )
    return listed


def stop_tokens(model: SteerableModel, sampling: Sampling) -> set[int]:
    """The sampling's own stop tokens and the model's end of text."""
    end = getattr(model.hf.config, "eos_token_id", None)
    ends = end if isinstance(end, list) else [] if end is None else [end]
    bos = model.tokenizer.bos_id
    return {*sampling.stop_at, *ends, *([] if bos is None else [bos])}


def _extended(batch: Batch, chosen: Int[Tensor, "batch"]) -> Batch:
    real = torch.ones_like(chosen, dtype=torch.bool)[:, None]
    return Batch(
        ids=torch.cat([batch.ids, chosen[:, None]], 1), real=torch.cat([batch.real, real], 1)
    )


def _refuse_too_long(model: SteerableModel, n_columns: int) -> None:
    if n_columns > model.n_context:
        raise UserError(
            "prompt and continuation do not fit the model's context",
            expected=f"at most {model.n_context} tokens",
            found=str(n_columns),
            fix="shorten the prompt or ask for fewer tokens",
        )
