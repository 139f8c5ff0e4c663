"""Options that several commands share, and what they become: overrides of a recipe, and a
RunContext."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from featureflow.errors import Command, Fix
from pipeline.stages import ALSO, STAGES, StageName, section_of

DEFAULT_RECIPE = "laptop"
_OF_A_RUN = ("run", *STAGES, *ALSO, "flow", "lens", "paper", "trace", "verify")
TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(kw_only=True)
class Given:
    """What the user's command said of the run: it belongs to every command that fixes."""

    options: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)


def _remembered(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
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


recipe_option = click.option(
    "--recipe",
    "-r",
    default=DEFAULT_RECIPE,
    callback=_remembered,
    show_default=True,
    help="name of a recipe in configs/, or a TOML file",
)
artifacts_option = click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    default=Path("artifacts"),
    callback=_remembered,
    show_default=True,
    help="folder that holds one folder of artifacts per recipe",
)
name_option = click.option(
    "--name",
    default=None,
    callback=_remembered,
    help="name of this run: its folder below --artifacts, for variants beside each other. What the "
    "recipe's own run "
    "has as it is wanted here, from collect to link, is shared with it  [default: the recipe's "
    "name]",
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="no progress bars")
_MACHINE_OPTIONS = (
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="torch device: cpu, cuda, cuda:1, mps, or auto",
    ),
    click.option(
        "--threads", default=0, show_default=True, help="cores to use; 0: all that this process may"
    ),
    click.option(
        "--scheduler",
        default=None,
        help="address of a Dask scheduler that runs, such as tcp://10.0.0.1:8786",
    ),
    click.option(
        "--workers",
        default=0,
        show_default=True,
        help="start a local Dask cluster with this many worker processes",
    ),
)


def run_folder(artifacts: Path, recipe: str) -> Path:
    """Where a recipe's artifacts lie, and those of a run with a --name: below `artifacts`, a dot in
    the name kept."""
    return artifacts / Path(recipe).name.removesuffix(".toml")


def folder_of_run(artifacts: Path, recipe_name: str, name: str | None) -> Path:
    """`artifacts/<name>`, by default that of the recipe. Raises click.UsageError for a name that is
    no single folder and one that tools would read as a file."""
    if name is None:
        return artifacts / recipe_name
    if name in ("", ".", "..") or run_folder(artifacts, name) != artifacts / name:
        raise click.UsageError(f"--name is the name of one folder, and no file's, not {name!r}")
    return artifacts / name


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device --threads --scheduler --workers`: where to compute; they never change a result."""
    for option in reversed(_MACHINE_OPTIONS):
        command = option(command)
    return command


_HOW = """
How to write a VALUE below: as in TOML, a list '["L1", "L2"]', a table '{kind = "topk", k = 8}'.
field(kind).x belongs to one kind of a choice: the kind's name alone may be VALUE of field, and
--<stage>.field.x changes x of the kind that the recipe names. field[].x is what each table of a
list says.
"""


class _StageHelp(click.Command):
    """Adds the stage's fields to its `--help`; the stage is imported only then."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from featureflow.settings import describe

        formatter.write(_HOW)
        for name in STAGES if self.name == "run" else (str(self.name),):
            section = section_of(name)
            formatter.write(
                f"\nFields of [{section}], each also an option (--{section}.<field> VALUE):\n"
            )
            config_type = StageName(name).module.Config
            for place, kind, default, meaning in describe(config_type, section):
                formatter.write(f"  --{place}  <{kind}>  default {default}\n")
                if meaning:
                    formatter.write(f"      {meaning}\n")


class StageCommand(_StageHelp):
    """A stage that is a plain command."""


class StageGroup(_StageHelp, click.Group):
    """A stage that also has tools as subcommands (`atlas serve`, `steer plan`).

    A group takes what it does not know for a subcommand, so overrides of the recipe are set aside
    before it looks.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        overrides, rest = split_overrides(args)
        ctx.meta["overrides"] = overrides
        return super().parse_args(ctx, rest)


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


def run_context(
    *, device: str, threads: int, scheduler: str | None, workers: int, progress: Any
) -> Any:
    """The RunContext that the machine options describe; sets torch's thread count."""
    import torch

    from pipeline.context import RunContext

    n_threads = threads or _n_cores()
    torch.set_num_threads(n_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = scheduler or ("local" if workers else None)
    return RunContext(
        progress=progress, device=device, n_threads=n_threads, scheduler=where, n_workers=workers
    )


def _n_cores() -> int:
    """Cores this process may use; where the system does not say (macOS, Windows), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
