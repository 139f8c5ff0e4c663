"""A language model beside the atlas: which features are active on a typed text, which links were
live, and steering.

    live = LiveAtlas(Run.open("artifacts/laptop"))           all of a run up to the atlas
    for record in live.read_text("The capital of France"): …
    for record in live.steer(["L12/402"], "I think", dose=0.3): …

1. one forward pass records every site; every dictionary encodes its own site, so the first records
   come early;
2. a link is live on a token when both its ends are active there; all kept links are looked at, by a
   sorted search;
3. a trace is sent as it grows (pipeline/trace/trace.py), and a supernode can be changed;
4. steering adds the features' directions, scaled so that the push costs `dose` nats a token on
   neutral text.

Records are the lines of docs/decisions/0003-atlas-shards.md, "Live server". `stop()` ends a
generator after its step.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from data.concepts.prompts import read_prompts
from featureflow.errors import UserError
from featureflow.sites import parse_feature
from pipeline.run import Run
from pipeline.trace.document import document_of
from pipeline.trace.editing import edit_prompt, plan_json, plan_of
from pipeline.trace.prompt import ids_of, iter_prompt
from sae import Sae
from steering.dose import NeutralText, measure, solve_for_dose
from steering.edits import Add
from steering.generation import Sampling, stream
from steering.plan import Plan

MAX_TOKENS, MAX_NEW_TOKENS, MAX_SAMPLES, MAX_LINKS = 256, 200, 4, 300_000
_NEUTRAL_TEXTS = 8
MAX_DOSE = 20.0  # nats a token; far beyond where text falls apart
MAX_FACTOR, MAX_FEATURES = 10.0, 64
_STEPS = ("Removing every supernode", "Random features, doses, heads and checks", "")
Record = dict[str, Any]


class _Stopped(Exception):
    """Somebody asked to stop in the middle of a computation."""


class LiveAtlas:
    """A run's model, SAEs and links beside its atlas. One generator may run at a time; `stop` is
    safe from another thread."""

    def __init__(self, run: Run) -> None:
        """Raises UserError when one of the run's artifacts is missing, or the model another."""
        made = run.need("collect", "train", "link", "describe", "atlas")
        self.site_folder = made["atlas"].path / "site"
        self.run, self.model, self.features = run, run.model, run.features
        self.saes, self.graph = run.saes, run.graph
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()

    def read_text(self, text: str) -> Generator[Record, None, None]:
        """The records of `POST /api/text`. Raises UserError for an empty or too long text."""
        self.stopped.clear()
        tokenizer = self.model.tokenizer
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        if not 1 < len(ids) <= MAX_TOKENS:
            raise UserError(
                "the text is empty or too long",
                found=f"{len(ids) - 1} tokens",
                expected=f"1 … {MAX_TOKENS - 1}",
            )
        yield {"tokens": ids, "pieces": [tokenizer.token_text(i) for i in ids]}
        activations = self.model.activations(torch.tensor([ids]), tuple(self.saes))
        active = []
        for index, (site, sae) in enumerate(self.saes.items()):
            if self.stopped.is_set():
                return
            record, keys = self._site_record(index, sae, activations[site][0])
            active.append(keys)
            yield record
        links = self._live_links(np.sort(np.concatenate(active)), len(ids))
        yield {"links": links[:MAX_LINKS], "cut": len(links) > MAX_LINKS}
        yield {"done": True}

    def steer(
        self,
        features: Sequence[str],
        prompt: str,
        *,
        dose: float = 0.2,
        n_samples: int = 1,
        n_new_tokens: int = 60,
        seed: int = 0,
    ) -> Generator[Record, None, None]:
        """The records of `POST /api/steer`: what it is at, then the text so far of either arm,
        after every token. Raises UserError."""
        self.stopped.clear()
        if not 1 <= n_samples <= MAX_SAMPLES or not 1 <= n_new_tokens <= MAX_NEW_TOKENS:
            raise UserError(
                "too many or too few samples or tokens",
                found=f"{n_samples} × {n_new_tokens}",
                expected=f"1 … {MAX_SAMPLES} × 1 … {MAX_NEW_TOKENS}",
            )
        if not 0 < dose <= MAX_DOSE:
            raise UserError(
                "a dose is a positive number of nats", found=str(dose), expected=f"up to {MAX_DOSE}"
            )
        plan = self._plan(features)
        yield {"status": "finding the strength for this dose on neutral text"}
        try:
            plan = self._at_dose(plan, dose)
        except _Stopped:
            return
        for sample in range(n_samples):
            sampling = Sampling(n_tokens=n_new_tokens)
            written: tuple[list[int], list[int]] = ([], [])
            for step in stream(
                self.model, self.saes, prompt, [None, plan], seed=seed + sample, sampling=sampling
            ):
                for row, token in zip(step.rows, step.ids, strict=True):
                    written[row].append(token)
                    text = self.model.tokenizer.decode(written[row])
                    yield {"arm": ("unsteered", "steered")[row], "sample": sample, "text": text}
                if self.stopped.is_set():
                    return
        yield {"done": True}

    def trace(
        self, prompt: str, *, answer: str | None = None, foil: str | None = None, chat: bool = False
    ) -> Generator[Record, None, None]:
        """The records of `POST /api/trace`: the document, more complete each time. Raises
        UserError."""
        self.stopped.clear()
        self._check_length(prompt, chat)
        growing = iter_prompt(
            self.run, prompt, answer=answer, foil=foil, chat=chat, progress=self._step
        )
        try:
            for found, next_step in zip(growing, _STEPS, strict=True):
                yield {"trace": document_of(found, self.run, prompt, chat=chat)}
                yield {"status": next_step} if next_step else {"done": True}
        except _Stopped:
            return

    def change(
        self,
        prompt: str,
        features: Sequence[str],
        token: int,
        *,
        factor: float = 0.0,
        other: str | None = None,
        chat: bool = False,
    ) -> Generator[Record, None, None]:
        """The records of `POST /api/trace/edit`. Raises UserError."""
        for text in (prompt, *([] if other is None else [other])):
            self._check_length(text, chat)
        if not 0 <= factor <= MAX_FACTOR or len(features) > MAX_FEATURES:
            expected = f"0 … {MAX_FACTOR:g}, at most {MAX_FEATURES} features"
            raise UserError("no change that is made here", found=f"×{factor}", expected=expected)
        changed = edit_prompt(
            self.run, prompt, features, token, factor=factor, other=other, chat=chat
        )
        yield {"changed": changed}
        yield {"done": True}

    def plan(
        self,
        prompt: str,
        features: Sequence[str],
        token: int,
        *,
        factor: float = 0.0,
        chat: bool = False,
    ) -> Generator[Record, None, None]:
        """The records of `POST /api/trace/plan`. Raises UserError."""
        self._check_length(prompt, chat)
        made = plan_of(self.run, prompt, features, token, factor=factor, chat=chat)
        yield {"plan": plan_json(made)}
        yield {"done": True}

    def _check_length(self, prompt: str, chat: bool) -> None:
        n = len(ids_of(self.model, prompt, chat))
        if n > MAX_TOKENS:
            expected = f"at most {MAX_TOKENS}"
            raise UserError("the prompt is too long", found=f"{n} tokens", expected=expected)

    def _step(self, label: str, done: int, total: int) -> None:
        if self.stopped.is_set():
            raise _Stopped

    def _site_record(self, index: int, sae: Sae, x: torch.Tensor) -> tuple[Record, np.ndarray]:
        """What is active at one site, as sorted numbers (site, latent, position). The
        BOS is left out."""
        codes = sae.encode_sparse(x[1:].float())
        at, slot = np.nonzero(codes.value.numpy() > 0)
        latent, value = codes.index.numpy()[at, slot], codes.value.numpy()[at, slot]
        largest = np.maximum(self._largest[index][latent], 1e-9)
        record = {
            "site": index,
            "at": (at + 1).tolist(),
            "latent": latent.tolist(),
            "value": np.round(value, 4).tolist(),
            "share": np.round(np.minimum(value / largest, 9.99), 4).tolist(),
        }
        start = int(self.graph.start[index])
        return record, (start + latent.astype(np.int64)) * MAX_TOKENS + at + 1

    @cached_property
    def _largest(self) -> list[np.ndarray]:
        """The largest activation of every latent on the corpus, site by site."""
        return np.split(self.features.table["max"].to_numpy(), self.graph.start[1:-1])

    def _live_links(self, active: np.ndarray, n_tokens: int) -> list[list[int]]:
        """(target site, target, source site, source, position) of the links whose two ends are
        active on the same token."""
        source, target = (self.graph.links[end].to_numpy() for end in ("source", "target"))
        found: list[list[int]] = []
        for position in range(1, n_tokens):
            here = active[active % MAX_TOKENS == position] // MAX_TOKENS
            live = np.isin(source, here) & np.isin(target, here)
            ends = []
            for number in (target[live], source[live]):
                site = self.graph.site_of(number)
                ends += [site, number - self.graph.start[site]]
            found += np.stack([*ends, np.full(live.sum(), position)], axis=1).tolist()
            if len(found) > MAX_LINKS:
                break
        return found

    def _plan(self, features: Sequence[str]) -> Plan:
        """Add the features' directions, each by its largest activation."""
        if not features:
            raise UserError("no feature to steer", expected="at least one, such as L12/402")
        chosen = sorted({parse_feature(f) for f in features})
        largest = self.features.table["max"].to_numpy()
        scales = {f: float(largest[self.features.number(f)]) or 1.0 for f in chosen}
        return Plan.from_chain([(f, 1.0) for f in chosen], edit=Add(), scales=scales)

    def _at_dose(self, plan: Plan, dose: float) -> Plan:
        """The plan as strong as costs `dose` on neutral text; looks after every try whether to
        stop."""

        def kl_at(strength: float) -> float:
            if self.stopped.is_set():
                raise _Stopped
            return measure(self.model, self.saes, plan.with_strength(strength), self._neutral).kl

        strength, _ = solve_for_dose(
            kl_at, dose, guess=1.0, known={}, tolerance=0.05, max_evaluations=8, max_strength=1e4
        )
        return plan.with_strength(strength, dose=dose)

    @cached_property
    def _neutral(self) -> NeutralText:
        return NeutralText.prepare(
            self.model, read_prompts().neutral_texts[:_NEUTRAL_TEXTS], n_tokens=32
        )
