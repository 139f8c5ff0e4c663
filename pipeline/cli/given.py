"""What the user's command said of the run: its options, and fields of the recipe.

Both belong to every command that an error names as its fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource

from featureflow.errors import Command, Fix
from pipeline.stages import ALSO, STAGES

_OF_A_RUN = ("run", *STAGES, *ALSO, "flow", "lens", "paper", "trace", "verify")


@dataclass(kw_only=True)
class Given:
    """Options of the run, and overrides of its recipe, as they were typed."""

    options: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Callback of an option that commands which fix must repeat."""
    name = str(parameter.name)
    if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
        ctx.ensure_object(Given).options[f"--{name}"] = str(value)
    return value


def as_typed(fix: Fix | None, given: Given) -> Fix | None:
    """`fix` with its commands as this user has to type them: the same recipe, folder and name, and
    the fields of the stages up to the one named."""
    if isinstance(fix, tuple):
        return tuple(str(as_typed(step, given)) for step in fix)
    if not isinstance(fix, Command) or fix.words[0] not in _OF_A_RUN or "--help" in fix.words:
        return fix
    words = [word for option in given.options.items() for word in option]
    if fix.words[1:] or fix.words[0] not in ("run", *STAGES, *ALSO):
        return fix.line(words)
    last = fix.to or (fix.words[0] if fix.words[0] in STAGES else STAGES[-1])
    up_to = STAGES[: STAGES.index(last) + 1] if last in STAGES else STAGES
    for name, value in given.fields.items():
        words += (f"--{name}", value) if name.partition(".")[0] in up_to else ()
    return fix.line(words)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of overrides (`--a.b`, its value, `--a.b=c`), and all others."""
    overrides: list[str] = []
    rest: list[str] = []
    waiting = False
    for word in words:
        is_override = _is_override(word)
        (overrides if waiting or is_override else rest).append(word)
        waiting = is_override and "=" not in word
    return overrides, rest


def _is_override(word: str) -> bool:
    return word.startswith("--") and "." in word.partition("=")[0]


def read_overrides(ctx: click.Context) -> dict[str, str]:
    """`--train.steps 500` and `--train.steps=500` as {"train.steps": "500"}."""
    fields = parse_overrides([*ctx.meta.get("overrides", ()), *ctx.args])
    ctx.ensure_object(Given).fields |= fields
    return fields


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """The words as overrides. Raises click.UsageError for one that is none."""
    overrides: dict[str, str] = {}
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            overrides[waiting], waiting = word, None
        elif _is_override(word):
            name, equals, value = word[2:].partition("=")
            if equals:
                overrides[name] = value
            else:
                waiting = name
        else:
            raise click.UsageError(f"no such option or argument: {word}")
    if waiting is not None:
        raise click.UsageError(f"--{waiting} needs a value")
    return overrides
