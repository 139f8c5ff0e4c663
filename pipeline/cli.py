"""The command `featureflow`: stages, the whole run, and the tools around stores, flow graphs, atlases and plans.

    featureflow run --recipe laptop            the whole pipeline; what is up to date is left alone
    featureflow train --recipe laptop --train.steps 500      one stage, with one field of the recipe changed
    featureflow flow show L12/402              a feature's flow, in the terminal

Every field of every stage is explained by `featureflow <stage> --help`. Errors a user can mend are printed without a
traceback (`--debug` shows it) and the exit code is not zero.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.console import complain, progress_bars, say, show_number, table
from pipeline.stages import STAGES, TITLES, StageName
from sae.errors import UserError

DEFAULT_RECIPE = "laptop"
RecipeOption = Annotated[
    str, typer.Option("--recipe", "-r", help="name of a recipe in configs/, or the path of a TOML file")
]
ArtifactsOption = Annotated[
    Path, typer.Option("--artifacts", help="folder that holds one folder of artifacts per recipe")
]
DeviceOption = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1, mps, or auto")]
ThreadsOption = Annotated[int, typer.Option(help="cores to use; 0 means all of this process's")]
SchedulerOption = Annotated[str | None, typer.Option(help="address of a Dask scheduler, e.g. tcp://10.0.0.1:8786")]
WorkersOption = Annotated[int, typer.Option(help="start a local Dask cluster with this many worker processes")]
ForceOption = Annotated[bool, typer.Option("--force", help="run although the artifact is up to date")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


class _StageHelp:
    """Adds the stage's fields to its `--help`; the stage is imported only then."""

    name: str | None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from pipeline.recipe import describe_fields

        names = STAGES if self.name == "run" else (str(self.name),)
        for name in names:
            formatter.write(f"\nFields of [{name}], each also an option (--{name}.<field> VALUE):\n\n")
            for place, kind, default, meaning in describe_fields(StageName(name).module.Config, name):
                formatter.write(f"  --{place}  <{kind}>  default {default}\n")
                if meaning:
                    formatter.write_text(f"      {meaning}") if len(meaning) < 100 else formatter.write(
                        f"      {meaning}\n"
                    )


class StageCommand(_StageHelp, TyperCommand):
    """A stage that is a plain command."""


class StageGroup(_StageHelp, TyperGroup):
    """A stage that also has tools as subcommands (`atlas serve`, `steer plan`)."""


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Find the features inside a language model, follow them from layer to layer, steer along their flow.",
)
store_app = typer.Typer(no_args_is_help=True, help="Look into an activation store, verify it, or import one.")
flow_app = typer.Typer(
    no_args_is_help=True, help="Ask the flow graph: show a feature, draw it, export it, rerun the paper."
)
sae_app = typer.Typer(no_args_is_help=True, help="Convert dictionaries from and to other tools' formats.")


def main() -> None:
    """Entry point: run the command line and turn every failure into an exit code and a readable message."""
    signal.signal(signal.SIGTERM, _interrupt)
    import sys

    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run_command(arguments, debug=debug))


def run_command(arguments: Sequence[str], *, debug: bool = False) -> int:
    """Run one command line in this process; returns the exit code and never raises."""
    try:
        code = app(args=list(arguments), prog_name="featureflow", standalone_mode=False)
        return int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UserError as error:
        _explain(error, f"error: {error}", debug)
        return 2
    except (KeyboardInterrupt, click.Abort):
        complain("interrupted; nothing is lost: run the same command again to go on")
        return 130
    except OSError as error:
        _explain(error, f"error: {error.strerror or error}: {error.filename or ''}", debug)
        return 3
    except MemoryError as error:
        _explain(error, "error: out of memory; use a smaller --train.batch_size or fewer sites", debug)
        return 3
    except Exception as error:
        _explain(
            error,
            f"internal error: {type(error).__name__}: {error}\n    run again with --debug for the traceback",
            debug,
        )
        return 1


def _explain(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        complain("".join(traceback.format_exception(error)))
    complain(message)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _overrides(extra: Sequence[str]) -> dict[str, str]:
    """`--train.steps 500` and `--train.steps=500` as {"train.steps": "500"}."""
    overrides: dict[str, str] = {}
    waiting: str | None = None
    for word in extra:
        if waiting is not None:
            overrides[waiting], waiting = word, None
        elif word.startswith("--") and "." in word:
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


def _context(device: str, threads: int, scheduler: str | None, workers: int, progress: Any) -> Any:
    import os

    import torch

    from pipeline.run import RunContext

    n_threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = scheduler or ("local" if workers else None)
    return RunContext(progress=progress, device=device, n_threads=n_threads, scheduler=where, n_workers=workers)


@app.command(cls=StageCommand, context_settings=OVERRIDES)
def run(
    ctx: typer.Context,
    recipe: RecipeOption = DEFAULT_RECIPE,
    to: Annotated[str, typer.Option(help="last stage to bring up to date")] = STAGES[-1],
    artifacts: ArtifactsOption = Path("artifacts"),
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    scheduler: SchedulerOption = None,
    workers: WorkersOption = 0,
    force: Annotated[list[str] | None, typer.Option(help="stage to run although it is up to date; repeatable")] = None,
    quiet: QuietOption = False,
) -> None:
    """Run the pipeline of a recipe: every stage that is not up to date, in order."""
    from pipeline.recipe import read_recipe
    from pipeline.run_index import write_run_index
    from pipeline.schedule import Events, run_recipe, stages_above

    for name in (to, *(force or ())):
        if name not in STAGES:
            raise click.UsageError(f"no such stage: {name}; the stages are {', '.join(STAGES)}")
    parsed = read_recipe(recipe, _overrides(ctx.args), stages_above(to))
    root = artifacts / parsed.name
    say(f"featureflow: recipe {parsed.name}: {parsed.description}" if parsed.description else f"recipe {parsed.name}")
    with progress_bars(quiet=quiet) as progress:
        context = _context(device, threads, scheduler, workers, progress)
        events = Events(started=lambda stage: say(f"{stage}: {TITLES[stage]} …"), finished=_report_stage)
        results = run_recipe(
            parsed, to=to, root=root, context_of=lambda stage: context, events=events, force=tuple(force or ())
        )
    index = write_run_index(root, parsed, [result.artifact for result in results])
    _report_run(results, index)


def _report_stage(result: Any) -> None:
    state = "up to date" if result.was_current else f"done in {result.seconds:.0f} s"
    say(f"{result.stage}: {state}")


def _report_run(results: Sequence[Any], index: Path) -> None:
    say()
    say("Headline numbers")
    for result in results:
        rows = [(f"  {key}", show_number(value)) for key, value in result.artifact.summary.items()]
        say(f" {result.stage}")
        for line in table(rows) if rows else ["  (none)"]:
            say(f" {line}")
    say()
    say("Artifacts")
    header = [("stage", "seconds", "where")]
    rows3 = [(r.stage, f"{r.artifact.made_by['seconds']:.0f}", str(r.artifact.path)) for r in results]
    for line in table(header + rows3):
        say(f"  {line}")
    say(f"  total seconds of work: {sum(r.artifact.made_by['seconds'] for r in results):.0f}")
    say(f"  open in a browser: {index}")
    for result in results:
        if result.stage == "atlas":
            say(f"  open in a browser: {result.artifact.path / 'site' / 'index.html'}")


def _stage_callback(stage: str) -> Any:
    def command(
        ctx: typer.Context,
        recipe: RecipeOption = DEFAULT_RECIPE,
        artifacts: ArtifactsOption = Path("artifacts"),
        device: DeviceOption = "auto",
        threads: ThreadsOption = 0,
        scheduler: SchedulerOption = None,
        workers: WorkersOption = 0,
        force: ForceOption = False,
        quiet: QuietOption = False,
    ) -> None:
        if ctx.invoked_subcommand is not None:
            return
        from pipeline.recipe import read_recipe
        from pipeline.schedule import Events, run_single, stages_above

        parsed = read_recipe(recipe, _overrides(ctx.args), stages_above(stage))
        with progress_bars(quiet=quiet) as progress:
            context = _context(device, threads, scheduler, workers, progress)
            events = Events(finished=_report_stage)
            root = artifacts / parsed.name
            result = run_single(parsed, stage, root=root, context_of=lambda _: context, events=events, force=force)
        for line in table([(f"  {key}", show_number(value)) for key, value in result.artifact.summary.items()]):
            say(line)
        say(f"  {result.artifact.path}")

    command.__doc__ = f"{TITLES[stage].capitalize()} (one stage; its inputs must be up to date)."
    return command


for _stage in STAGES:
    if _stage in ("atlas", "steer"):
        continue
    app.command(_stage, cls=StageCommand, context_settings=OVERRIDES)(_stage_callback(_stage))
atlas_app = typer.Typer(
    invoke_without_command=True,
    cls=StageGroup,
    context_settings=OVERRIDES,
    help=f"{TITLES['atlas'].capitalize()}; and the atlas's tools.",
)
steer_app = typer.Typer(
    invoke_without_command=True,
    cls=StageGroup,
    context_settings=OVERRIDES,
    help=f"{TITLES['steer'].capitalize()}; and steering's tools.",
)
atlas_app.callback()(_stage_callback("atlas"))
steer_app.callback()(_stage_callback("steer"))
app.add_typer(atlas_app, name="atlas")
app.add_typer(steer_app, name="steer")
app.add_typer(store_app, name="store")
app.add_typer(flow_app, name="flow")
app.add_typer(sae_app, name="sae")


@app.command()
def recipes() -> None:
    """List the recipes that can be named."""
    import tomllib

    rows = []
    for folder in (Path("configs"), Path(__file__).parent.parent / "configs"):
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            if path.stem not in {row[0] for row in rows}:
                rows.append((path.stem, tomllib.loads(path.read_text(encoding="utf-8")).get("description", "")))
    for line in table(rows):
        say(line)
