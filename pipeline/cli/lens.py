"""`featureflow lens`: look at a run through a lens. Options are the fields of the lens' Config."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from featureflow.errors import Command, Problem, UserError
from featureflow.settings import Field, describe
from pipeline.cli.options import machine_options, quiet_option, run_context, run_folder, run_options
from pipeline.console import progress_bars, say, table
from pipeline.lenses.base import LensConfig, add_file, find_lens, lens_names, run_lens
from pipeline.run import Run
from pipeline.stages.lenses import options_of
from pipeline.stages.recipe import lens_options, value_of

PAPER = "paper"


class _Lenses(click.Group):
    """Every lens as a command, imported when it is asked for; `only` limits the list."""

    only: str | None = None

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = super().list_commands(ctx)
        if self.only is None:
            return [*own, *lens_names()]
        return [name for name in lens_names() if _group(find_lens(name)) == self.only]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if (own := super().get_command(ctx, name)) is not None:
            return own
        if name.endswith(".py"):
            name = add_file(name)
        return _command(name)


@click.group("lens", cls=_Lenses, no_args_is_help=True)
def lens_commands() -> None:
    """Look at a run through a lens: tables, a figure and a text in <recipe>/lenses/NAME.

    NAME is one of the list below, or the path of a file that holds a lens of your own (.py).
    """


@click.group(PAPER, cls=_Lenses, no_args_is_help=True)
def paper_commands() -> None:
    """Rerun an experiment of the papers on a linked model (the lenses of that group)."""


paper_commands.only = PAPER


@lens_commands.command("list")
@click.option("--markdown", is_flag=True, help="as a Markdown table, for docs/lenses.md")
def list_lenses(markdown: bool) -> None:
    """List every lens: what it shows, and what it needs."""
    rows = []
    for name in lens_names():
        lens = find_lens(name)
        rows.append((name, lens.TITLE, ", ".join(lens.NEEDS), _group(lens)))
    if markdown:
        head = ("lens", "what it shows", "needs", "group")
        for row in (head, ("---",) * len(head), *rows):
            say(f"| {' | '.join(row)} |")
        return
    for line in table([row[:3] for row in rows]):
        say(line)


def _group(lens: ModuleType) -> str:
    return getattr(lens, "GROUP", "")


def _command(lens_name: str) -> click.Command:
    lens = find_lens(lens_name)

    def command(
        recipe: str, name: str | None, artifacts: Path, force: bool, quiet: bool, **others: Any
    ) -> None:
        machine = {key: others.pop(key) for key in ("device", "threads", "scheduler", "workers")}
        given = {key: value_of(text) for key, text in others.items() if text is not None}
        config = _config(lens_name, recipe, given)
        with progress_bars(quiet=quiet) as progress:
            context = run_context(progress=progress, **machine)
            run = Run.open(run_folder(artifacts, recipe, name), context=context)
            found = run_lens(lens_name, run, config, force=force)
        say(found.file("text.md").read_text(encoding="utf-8"))
        figure = "  (figure: figure.png)" if "figure.png" in found.files else ""
        say(f"{found.path}{figure}")

    fields = [field for field in describe(lens.Config, "") if field.place.count(".") == 1]
    for field in reversed(fields):  # what is inside a field is part of its VALUE
        command = _option(field)(command)
    command = machine_options(quiet_option(command))
    command = click.option("--force", is_flag=True, help="look again although it is up to date")(
        command
    )
    asis = "\b\n" + cleandoc(str(lens.__doc__)).replace("\n\n", "\n\n\b\n")
    return click.command(lens_name, help=asis, short_help=lens.TITLE)(run_options(command))


def _option(field: Field) -> Callable[..., Any]:
    """`n_tokens` as `--n-tokens`, and as `--tokens`."""
    name = field.place.removeprefix(".")
    flags = [
        "--" + each.replace("_", "-") for each in dict.fromkeys((name, name.removeprefix("n_")))
    ]
    meaning = f"{field.meaning} <{field.type}>  [default: {field.default}]"
    return click.option(*flags, name, default=None, metavar="VALUE", help=meaning)


def _config(name: str, recipe: str, given: dict[str, Any]) -> LensConfig:
    """The options that the recipe has for this lens, with those of the command line over them."""
    problems: list[Problem] = []
    config = options_of(name, {**lens_options(recipe, name), **given}, name, problems)
    if config is None:
        raise UserError(
            "these options cannot be used",
            problems=tuple(problems),
            fix=Command("lens", name, "--help"),
        )
    return config
