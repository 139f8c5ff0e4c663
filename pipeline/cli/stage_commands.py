"""The commands that make artifacts: `featureflow run`, and one command a stage."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    TAKES_OVERRIDES,
    StageCommand,
    StageGroup,
    artifacts_option,
    folder_of_run,
    machine_options,
    name_option,
    quiet_option,
    read_overrides,
    recipe_option,
    run_context,
)
from pipeline.console import progress_bars, say, show_number, table
from pipeline.stages import ALSO, STAGES, TITLES

_WARNINGS_SHOWN = 3


@click.command(cls=StageCommand, context_settings=TAKES_OVERRIDES)
@recipe_option
@click.option(
    "--to",
    type=click.Choice((*STAGES, *ALSO)),
    default=STAGES[-1],
    help="last stage to bring up to date",
)
@click.option(
    "--force",
    multiple=True,
    type=click.Choice(STAGES),
    help="stage to run although it is up to date; repeatable",
)
@name_option
@artifacts_option
@machine_options
@quiet_option
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str,
    to: str,
    force: tuple[str, ...],
    name: str | None,
    artifacts: Path,
    quiet: bool,
    **machine: Any,
) -> None:
    """Run the pipeline of a recipe: every stage that is not up to date, in order."""
    from pipeline.run import Run
    from pipeline.stages.recipe import read_recipe
    from pipeline.stages.run_index import write_run_index
    from pipeline.stages.schedule import Events, run_recipe, stages_above

    parsed = read_recipe(recipe, read_overrides(ctx), stages_above(to))
    root = folder_of_run(artifacts, parsed.name, name)
    say(f"featureflow, recipe {parsed.name}: {parsed.description}")
    with progress_bars(quiet=quiet) as progress:
        context = run_context(progress=progress, **machine)
        events = Events(
            started=lambda stage: say(f"{stage}: {_title(stage)} …"), finished=_report_stage
        )
        results = run_recipe(
            parsed,
            to=to,
            root=root,
            context_of=lambda stage: context,
            events=events,
            force=force,
            shared=artifacts / parsed.name,
        )
    index = write_run_index(root, parsed, Run.open(root))
    _report_run(results, index)


def _title(stage: str) -> str:
    """One line about a stage or a lens (`lenses/<name>`)."""
    from pipeline.lenses.base import find_lens

    name = stage.partition("/")[2]
    return find_lens(name).TITLE if name else TITLES[stage]


def _report_stage(result: Any) -> None:
    say(
        f"{result.stage}: "
        + ("up to date" if result.was_current else f"done in {result.seconds:.0f} s")
    )


def _report_run(results: Sequence[Any], index: Path) -> None:
    say("\nHeadline numbers")
    for result in results:
        say(f"  {result.stage}")
        for line in [*_summary_lines(result.artifact), *_warning_lines(result.artifact)]:
            say(f"    {line}")
    say("\nArtifacts (seconds are those of the run that made them)")
    rows = [
        (r.stage, f"{r.artifact.made_by['seconds']:.0f} s", str(r.artifact.path)) for r in results
    ]
    for line in table(rows):
        say(f"  {line}")
    say(f"  {sum(r.artifact.made_by['seconds'] for r in results):.0f} s altogether")
    say("\nOpen in a browser")
    say(f"  {index}")
    for result in results:
        if "site/index.html" in result.artifact.files:
            say(f"  {result.artifact.path / 'site' / 'index.html'}")


def _summary_lines(artifact: Any) -> list[str]:
    return table(
        [(key.replace("_", " "), show_number(value)) for key, value in artifact.summary.items()]
    )


def _warning_lines(artifact: Any) -> list[str]:
    """What a stage wants known about its result: the first of its warnings, and where the others
    are."""
    if "warnings.json" not in artifact.files:
        return []
    path = artifact.file("warnings.json")
    warnings = json.loads(path.read_text(encoding="utf-8"))
    n_more = len(warnings) - _WARNINGS_SHOWN
    more = [f"note: {n_more} more in {path}"] if n_more > 0 else []
    return [f"note: {text}" for text in warnings[:_WARNINGS_SHOWN]] + more


def stage_command(stage: str, tools: Sequence[click.Command] = ()) -> click.Command:
    """The command of a stage; with tools it is a group that they belong to."""

    @recipe_option
    @click.option("--force", is_flag=True, help="run although the artifact is up to date")
    @name_option
    @artifacts_option
    @machine_options
    @quiet_option
    @click.pass_context
    def command(
        ctx: click.Context,
        recipe: str,
        force: bool,
        name: str | None,
        artifacts: Path,
        quiet: bool,
        **machine: Any,
    ) -> None:
        if ctx.invoked_subcommand is not None:
            return
        from pipeline.stages.recipe import read_recipe
        from pipeline.stages.schedule import Events, run_single, stages_above

        parsed = read_recipe(recipe, read_overrides(ctx), stages_above(stage))
        with progress_bars(quiet=quiet) as progress:
            context = run_context(progress=progress, **machine)
            root = folder_of_run(artifacts, parsed.name, name)
            results = run_single(
                parsed,
                stage,
                root=root,
                context_of=lambda _: context,
                events=Events(finished=_report_stage),
                force=force,
                shared=artifacts / parsed.name,
            )
        for result in results:
            for line in [*_summary_lines(result.artifact), *_warning_lines(result.artifact)]:
                say(f"  {line}")
            say(f"  {result.artifact.path}")

    command.__doc__ = (
        f"{TITLES[stage].capitalize()} (this stage alone; its inputs must be up to date)."
    )
    settings: dict[str, Any] = {
        "cls": StageGroup if tools else StageCommand,
        "short_help": TITLES[stage].capitalize(),
        "context_settings": TAKES_OVERRIDES,
    }
    if tools:
        group = click.group(stage, invoke_without_command=True, **settings)(command)
        for tool in tools:
            group.add_command(tool)
        return group
    return click.command(stage, **settings)(command)


@click.command()
def recipes() -> None:
    """List the recipes that can be named."""
    found: dict[str, str] = {}
    for folder in (Path("configs"), Path(__file__).parents[2] / "configs"):
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            found.setdefault(
                path.stem, tomllib.loads(path.read_text(encoding="utf-8")).get("description", "")
            )
    for line in table([*found.items()]):
        say(line)
