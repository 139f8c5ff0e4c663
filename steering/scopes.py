"""Scopes: which tokens an edit may touch.

A scope turns the Window of a pass into a mask `[batch, position]`; padding is never in it.
Positions count the real tokens of a sequence from 0, so they mean the same under left padding and
with a key-value cache. `WhereActive` asks a feature: its own node's feature, or one named by
`feature` at the same or an earlier site.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Bool
from torch import Tensor

from steering.choice import FromFile
from steering.window import Window


class Everywhere(FromFile):
    kind: Literal["everywhere"] = "everywhere"


class InPrompt(FromFile):
    kind: Literal["prompt"] = "prompt"


class Generated(FromFile):
    """The tokens after the prompt; the prompt's last token, which chooses the first of them,
    belongs to the prompt."""

    kind: Literal["generated"] = "generated"


class Positions(FromFile):
    """Positions from the start of the sequence; negative ones count back from the end of the prompt
    (-1: its last)."""

    positions: tuple[int, ...]
    kind: Literal["positions"] = "positions"


class FirstTokens(FromFile):
    n: int
    kind: Literal["first"] = "first"


class AfterToken(FromFile):
    """Every token after the first occurrence of a token id (the token itself not included)."""

    token: int
    kind: Literal["after_token"] = "after_token"


class WhereActive(FromFile):
    """Tokens where a feature's activation exceeds `above`; without `feature`, each node asks its
    own."""

    feature: str | None = None
    above: float = 0.0
    kind: Literal["where_active"] = "where_active"


Scope = Everywhere | InPrompt | Generated | Positions | FirstTokens | AfterToken | WhereActive


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
