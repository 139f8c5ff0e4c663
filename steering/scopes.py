"""Scopes: which tokens an edit may touch, and where in its sequence each token of a pass stands.

1. `WindowTracker.watching(model)` sets a pre-hook on the module that runs the layers; before every
   pass it reads the token ids, the attention mask and the length of the cache.
2. A pass with an empty cache starts new sequences: all its columns are prompt, unless
   `expect_prompt` said how many are. A pass with a cache continues them: its columns are generated
   text.
3. `Window` answers for the columns of the present pass: which are real (not padding), their
   position in their sequence (padding not counted), which belong to the prompt, and which token
   stands there. The answer is the same with a cache and without, with left padding and without.
4. `scope_mask` turns a scope and the Window into a mask `[batch, position]`; padding is never in
   it. `WhereActive` asks a feature: its own node's feature, or one named by `feature` at the same
   or an earlier site.

Beam search reorders the rows of a cache unseen; scopes that look back at earlier tokens are wrong
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, assert_never

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from featureflow.errors import UserError
from featureflow.settings import ByKind, Settings


class Everywhere(Settings):
    kind: Literal["everywhere"] = "everywhere"


class InPrompt(Settings):
    kind: Literal["prompt"] = "prompt"


class Generated(Settings):
    """The tokens after the prompt; the prompt's last token, which chooses the first of them,
    belongs to the prompt."""

    kind: Literal["generated"] = "generated"


class Positions(Settings):
    """Positions from the start of the sequence; negative ones count back from the end of the prompt
    (-1: its last)."""

    positions: tuple[int, ...]
    kind: Literal["positions"] = "positions"


class FirstTokens(Settings):
    n: int
    kind: Literal["first"] = "first"


class AfterToken(Settings):
    """Every token after the first occurrence of a token id (the token itself not included)."""

    token: int
    kind: Literal["after_token"] = "after_token"


class WhereActive(Settings):
    """Tokens where a feature's activation exceeds `above`; without `feature`, each node asks its
    own."""

    feature: str | None = None
    above: float = 0.0
    kind: Literal["where_active"] = "where_active"


Scope = Annotated[
    Everywhere | InPrompt | Generated | Positions | FirstTokens | AfterToken | WhereActive, ByKind()
]


def scope_mask(scope: Scope, window: Window) -> Bool[Tensor, "batch position"]:
    """The tokens of the pass in the scope. `WhereActive` gives every real token: activity is asked
    at the site."""
    here = window.here()
    match scope:
        case Everywhere() | WhereActive():
            return here
        case InPrompt():
            return window.in_prompt()
        case Generated():
            return here & ~window.in_prompt()
        case Positions(positions=positions):
            return here & _is_one_of(positions, window)
        case FirstTokens(n=n):
            return here & (window.position < n)
        case AfterToken(token=token):
            found = (window.ids == token) & window.real
            before = found.long().cumsum(dim=-1) - found.long()
            return here & (before > 0)[:, window.start :]
        case _:
            assert_never(scope)


def _is_one_of(positions: tuple[int, ...], window: Window) -> Bool[Tensor, "batch position"]:
    place = window.position
    wanted = torch.zeros_like(place, dtype=torch.bool)
    for position in positions:
        wanted |= place == (position if position >= 0 else window.prompt_length() + position)
    return wanted


@dataclass(frozen=True, kw_only=True)
class Window:
    """The sequences so far; the present pass computes the columns from `start` on."""

    ids: Int[Tensor, "batch column"]
    real: Bool[Tensor, "batch column"]
    start: int
    prompt_columns: int

    @cached_property
    def position(self) -> Int[Tensor, "batch position"]:
        """0 for the first real token of each row; negative on padding. Asked by every plan at every
        site of a pass."""
        return (self.real.long().cumsum(dim=-1) - 1)[:, self.start :].masked_fill(~self.here(), -1)

    def here(self) -> Bool[Tensor, "batch position"]:
        """Which tokens of the present pass are real."""
        return self.real[:, self.start :]

    def in_prompt(self) -> Bool[Tensor, "batch position"]:
        columns = torch.arange(self.start, self.real.shape[1], device=self.real.device)
        return self.here() & (columns < self.prompt_columns)

    def prompt_length(self) -> Int[Tensor, "batch 1"]:
        return self.real[:, : self.prompt_columns].long().sum(dim=-1, keepdim=True)


class WindowTracker:
    """Keeps the Window of the latest pass in `window`."""

    def __init__(self) -> None:
        self._window: Window | None = None
        self._expected_prompt: int | None = None
        self.n_passes = 0

    @property
    def window(self) -> Window:
        if self._window is None:
            raise UserError(
                "an edited site ran outside a forward pass of the model",
                expected="the model that was given to `applied`",
            )
        return self._window

    def expect_prompt(self, n_columns: int | None) -> None:
        """Say how many columns are prompt when sequences are run again from the start without a
        cache."""
        self._expected_prompt = n_columns

    @contextmanager
    def watching(self, module: torch.nn.Module) -> Iterator[None]:
        handle = module.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._window = None

    def _before_pass(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"].new_full(
                kwargs["inputs_embeds"].shape[:2], -1, dtype=torch.long
            )
        cache = kwargs.get("past_key_values")
        n_past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._window = self._next_window(ids, mask, n_past)
        self.n_passes += 1

    def _next_window(self, ids: Tensor, mask: Tensor | None, n_past: int) -> Window:
        past = self._past(ids, n_past)
        real = self._real(ids, mask, past, n_past)
        known_ids = ids if past is None else torch.cat([past.ids[:, :n_past], ids], dim=1)
        if n_past == 0:
            expected = self._expected_prompt
            prompt_columns = ids.shape[1] if expected is None else min(expected, ids.shape[1])
        else:
            prompt_columns = (
                self._expected_prompt
                if self._expected_prompt is not None
                else self.window.prompt_columns
            )
        return Window(ids=known_ids, real=real, start=n_past, prompt_columns=prompt_columns)

    def _past(self, ids: Tensor, n_past: int) -> Window | None:
        if n_past == 0:
            return None
        past = self._window
        if past is None or past.ids.shape[1] < n_past or past.ids.shape[0] != ids.shape[0]:
            raise UserError(
                "the cache was filled before steering began, so positions are not known",
                expected=f"a cache filled inside `applied` for {ids.shape[0]} rows",
                found=f"{n_past} cached tokens",
                fix="run the prompt inside the context manager too",
            )
        return past

    @staticmethod
    def _real(ids: Tensor, mask: Tensor | None, past: Window | None, n_past: int) -> Tensor:
        n_columns = n_past + ids.shape[1]
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= n_columns:
            return mask[:, :n_columns].bool()
        new = torch.ones_like(ids, dtype=torch.bool)
        return new if past is None else torch.cat([past.real[:, :n_past], new], dim=1)
