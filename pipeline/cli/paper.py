"""`featureflow paper`: rerun an experiment of Feature Flow or SAE Match on one's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featureflow.errors import Command
from pipeline.cli.options import (
    artifacts_option,
    machine_options,
    quiet_option,
    recipe_option,
    run_context,
    run_folder,
)
from pipeline.console import progress_bars, say
from pipeline.lenses.paper import EXPERIMENTS, FIGURE, REPORT

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.context import RunContext
    from pipeline.lenses.paper.subject import Effort, Subject
    from pipeline.run import Run

SCHEMA = 1
INPUTS = ("collect", "train", "link")


@click.group("paper", no_args_is_help=True)
def paper_commands() -> None:
    """Rerun an experiment of the papers on a linked model: tables, a figure and a text in
    <recipe>/paper/."""


def _effort_options(command: Callable[..., None], left_out: tuple[str, ...]) -> Callable[..., None]:
    defaults = {
        "n_tokens": 8192,
        "n_pairs": 6,
        "n_targets": 150,
        "n_contexts": 32,
        "n_exhaustive": 20,
        "seed": 0,
    }
    meaning = {
        "n_tokens": "held-out tokens on which firing is looked at",
        "n_pairs": "layers or pairs of layers, spread over the depth",
        "n_targets": "firing features tested per layer",
        "n_contexts": "held-out contexts that targets and losses come from",
        "n_exhaustive": "targets per pair for which every active predecessor is tried",
        "seed": "of every choice",
    }
    for name, default in reversed(defaults.items()):
        if name in left_out:
            continue
        option = "--" + name.removeprefix("n_")
        command = click.option(
            option, name, default=default, show_default=True, help=meaning[name]
        )(command)
    return command


def _experiment_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What every experiment takes: recipe, artifacts, effort (but for what is left out), force,
    machine."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        command = machine_options(quiet_option(command))
        command = click.option("--force", is_flag=True, help="run although the result is there")(
            command
        )
        return recipe_option(artifacts_option(_effort_options(command, left_out)))

    return decorated


def _command(name: str) -> click.Command:
    @_experiment_options()
    def command(recipe: str, artifacts: Path, force: bool, quiet: bool, **others: Any) -> None:
        def work(effort_fields: dict[str, int], context: RunContext) -> Artifact:
            return make(name, run_folder(artifacts, recipe), effort_fields, context, force=force)

        _run(work, others, quiet)

    title = EXPERIMENTS[name][2]
    command.__doc__ = f"{title[0].upper()}{title[1:]}."
    return click.command(name, short_help=title.partition(" (")[0])(command)


@paper_commands.command("starts")
@_experiment_options("n_pairs", "n_exhaustive")
@click.option(
    "--layers", default=6, show_default=True, help="neighbouring layers, in the middle of the model"
)
@click.option(
    "--steps",
    default=800,
    show_default=True,
    help="optimizer steps a dictionary, on average over the layers",
)
def starts(
    recipe: str, artifacts: Path, force: bool, quiet: bool, layers: int, steps: int, **others: Any
) -> None:
    """Train independent, shared and chained dictionaries, compare their links by four matchers."""

    def work(effort_fields: dict[str, int], context: RunContext) -> Artifact:
        from pipeline.cli.paper_starts import make_starts
        from pipeline.run import Run

        opened = Run.open(run_folder(artifacts, recipe), context=context)
        effort = _effort(effort_fields)
        return make_starts(opened, effort, n_layers=layers, steps=steps, force=force)

    _run(work, others, quiet)


def _run(
    work: Callable[[dict[str, int], RunContext], Artifact], others: dict[str, Any], quiet: bool
) -> None:
    machine = {key: others.pop(key) for key in ("device", "threads", "scheduler", "workers")}
    with progress_bars(quiet=quiet) as progress:
        found = work(others, run_context(progress=progress, **machine))
    say(found.file(REPORT).read_text(encoding="utf-8"))
    say(f"{found.path}  (figure: {FIGURE})")


def make(
    name: str,
    root: Path,
    effort_fields: dict[str, int],
    context: RunContext,
    *,
    force: bool = False,
) -> Artifact:
    """The artifact of one experiment, made if it is not there. Raises UserError."""
    from pipeline.artifact import Artifact, digest_of
    from pipeline.lenses.paper import run_experiment, write_finding
    from pipeline.run import Run

    effort = _effort(effort_fields)
    opened = Run.open(root, context=context)
    inputs = opened.need(*INPUTS)
    digests = {stage: artifact.digest for stage, artifact in inputs.items()}
    kind, out = f"paper-{name}", root / "paper" / name
    config = effort.model_dump()
    if force or not Artifact.is_current(out, digest_of(kind, SCHEMA, config, digests)):
        subject = _subject(opened, effort)
        with Artifact.create(out, kind=kind, schema=SCHEMA, config=config, inputs=digests) as draft:
            finding = run_experiment(name, subject, effort)
            write_finding(finding, draft.path)
            draft.summary.update(finding.summary)
    return Artifact.open(out, kind=kind, schema=SCHEMA, fix=Command("paper", name))


def _effort(fields: dict[str, int]) -> Effort:
    from pydantic import TypeAdapter, ValidationError

    from featureflow.errors import UserError
    from pipeline.lenses.paper.subject import Effort

    try:
        return TypeAdapter(Effort).validate_python(fields)
    except ValidationError as error:
        raise UserError("these numbers cannot be used", found=str(error)) from error


def _subject(opened: Run, effort: Effort) -> Subject:
    """The linked model of a run."""
    from pipeline.cli.paper_tokens import contexts_of, rows_after_contexts
    from pipeline.flow.sources import HeldOutRows
    from pipeline.lenses.paper.subject import Subject

    store = opened.store
    return Subject(
        dictionaries=opened.saes.keeping(0, device="cpu"),
        edges=opened.graph.edges,
        held_out=HeldOutRows(url=store.url, rows=rows_after_contexts(store, effort)),
        open_model=lambda: opened.model,
        contexts=contexts_of(store),
        progress=opened.context.progress,
    )


for _name in EXPERIMENTS:
    paper_commands.add_command(_command(_name))
