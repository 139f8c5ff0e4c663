"""The commands that make artifacts: `featureflow run`, and one command a stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from featureflow.settings import describe
from pipeline.cli.given import read_overrides, split_overrides
from pipeline.cli.options import machine_options, quiet_option, run_context, run_folder, run_options
from pipeline.console import progress_bars, say, show_number, table
from pipeline.lenses.base import find_lens
from pipeline.run import Run
from pipeline.stages import ALSO, STAGES, TITLES, StageName, section_of
from pipeline.stages.recipe import read_recipe
from pipeline.stages.run_index import write_run_index
from pipeline.stages.schedule import Events, run_recipe, run_single, stages_above

_TAKES_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
_WARNINGS_SHOWN = 3
_HOW = """
How to write a VALUE below: as in TOML, a list '["L1", "L2"]', a table '{kind = "topk", k = 8}'.
field(kind).x belongs to one kind of a choice: the kind's name alone may be VALUE of field, and
--<stage>.field.x changes x of the kind that the recipe names. field[].x is what each table of a
list says.
"""


class _StageCommand(click.Command):
    """Adds the stage's fields to its `--help`."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(_HOW)
        for name in STAGES if self.name == "run" else (str(self.name),):
            section = section_of(name)
            formatter.write(
                f"\nFields of [{section}], each also an option (--{section}.<field> VALUE):\n"
            )
            for place, kind, default, meaning in describe(StageName(name).module.Config, section):
                formatter.write(f"  --{place}  <{kind}>  default {default}\n")
                if meaning:
                    formatter.write(f"      {meaning}\n")


class _StageGroup(_StageCommand, click.Group):
    """A stage that also has tools as subcommands (`atlas find`, `steer plan`).

    A group takes what it does not know for a subcommand, so overrides of the recipe are set aside
    before it looks.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        overrides, rest = split_overrides(args)
        ctx.meta["overrides"] = overrides
        return super().parse_args(ctx, rest)


@click.command(cls=_StageCommand, context_settings=_TAKES_OVERRIDES)
@click.option(
    "--to",
    type=click.Choice((*STAGES, *ALSO)),
    default=STAGES[-1],
    show_default=False,
    help="last stage to bring up to date",
)
@click.option(
    "--force",
    multiple=True,
    type=click.Choice(STAGES),
    help="stage to run although it is up to date; repeatable",
)
@run_options
@machine_options
@quiet_option
@click.pass_context
def run(
    ctx: click.Context,
    to: str,
    force: tuple[str, ...],
    recipe: str,
    name: str | None,
    artifacts: Path,
    quiet: bool,
    **machine: Any,
) -> None:
    """Run the pipeline of a recipe: every stage that is not up to date, in order."""
    parsed = read_recipe(recipe, read_overrides(ctx), stages_above(to))
    root = run_folder(artifacts, parsed.name, name)
    say(f"featureflow, recipe {parsed.name}: {parsed.description}")
    with progress_bars(quiet=quiet) as progress:
        context = run_context(progress=progress, **machine)
        results = run_recipe(
            parsed,
            to=to,
            root=root,
            context=context,
            events=Events(
                started=lambda stage: say(f"{stage}: {_title(stage)} …"), finished=_report_stage
            ),
            force=force,
            shared=artifacts / parsed.name,
        )
    _report_run(results, write_run_index(root, parsed, Run.open(root)))


def _title(stage: str) -> str:
    """One line about a stage or a lens (`lenses/<name>`)."""
    name = stage.partition("/")[2]
    return find_lens(name).TITLE if name else TITLES[stage]


def _report_stage(result: Any) -> None:
    state = "up to date" if result.was_current else f"done in {result.seconds:.0f} s"
    say(f"{result.stage}: {state}")


def _report_run(results: Sequence[Any], index: Path) -> None:
    say("\nHeadline numbers")
    for result in results:
        say(f"  {result.stage}")
        for line in _lines(result.artifact):
            say(f"    {line}")
    say("\nArtifacts (seconds are those of the run that made them)")
    seconds = [result.artifact.made_by["seconds"] for result in results]
    rows = [
        (r.stage, f"{s:.0f} s", str(r.artifact.path)) for r, s in zip(results, seconds, strict=True)
    ]
    for line in table(rows):
        say(f"  {line}")
    say(f"  {sum(seconds):.0f} s altogether")
    say("\nOpen in a browser")
    say(f"  {index}")
    for result in results:
        if "site/index.html" in result.artifact.files:
            say(f"  {result.artifact.path / 'site' / 'index.html'}")


def _lines(artifact: Any) -> list[str]:
    """Headline numbers, then what the stage wants known about its result: the first of its
    warnings, and where the others are."""
    summary = [
        (key.replace("_", " "), show_number(value)) for key, value in artifact.summary.items()
    ]
    if "warnings.json" not in artifact.files:
        return table(summary)
    path = artifact.file("warnings.json")
    warnings = json.loads(path.read_text(encoding="utf-8"))
    n_more = len(warnings) - _WARNINGS_SHOWN
    more = [f"note: {n_more} more in {path}"] if n_more > 0 else []
    return [*table(summary), *(f"note: {text}" for text in warnings[:_WARNINGS_SHOWN]), *more]


def stage_command(stage: str, tools: Sequence[click.Command] = ()) -> click.Command:
    """The command of a stage; with tools it is a group that they belong to."""

    @run_options
    @click.option("--force", is_flag=True, help="run although the artifact is up to date")
    @machine_options
    @quiet_option
    @click.pass_context
    def command(
        ctx: click.Context,
        recipe: str,
        name: str | None,
        artifacts: Path,
        force: bool,
        quiet: bool,
        **machine: Any,
    ) -> None:
        if ctx.invoked_subcommand is not None:
            return
        parsed = read_recipe(recipe, read_overrides(ctx), stages_above(stage))
        with progress_bars(quiet=quiet) as progress:
            context = run_context(progress=progress, **machine)
            results = run_single(
                parsed,
                stage,
                root=run_folder(artifacts, parsed.name, name),
                context=context,
                events=Events(finished=_report_stage),
                force=force,
                shared=artifacts / parsed.name,
            )
        for result in results:
            for line in [*_lines(result.artifact), str(result.artifact.path)]:
                say(f"  {line}")

    title = TITLES[stage].capitalize()
    command.__doc__ = f"{title} (this stage alone; its inputs must be up to date)."
    settings: dict[str, Any] = {"short_help": title, "context_settings": _TAKES_OVERRIDES}
    if not tools:
        return click.command(stage, cls=_StageCommand, **settings)(command)
    group = click.group(stage, cls=_StageGroup, invoke_without_command=True, **settings)(command)
    for tool in tools:
        group.add_command(tool)
    return group
