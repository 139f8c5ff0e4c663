"""`featureflow paper`: rerun an experiment of Feature Flow or SAE Match on one's own model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.options import artifacts_option, machine_options, quiet_option, recipe_option, run_context
from pipeline.console import progress_bars, say
from pipeline.flow.experiments import EXPERIMENTS, FIGURE, REPORT

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.flow.experiments.subject import Subject
    from pipeline.run import RunContext

SCHEMA = 1
INPUTS = ("collect", "train", "link")


@click.group("paper", no_args_is_help=True)
def paper_commands() -> None:
    """Rerun an experiment of the papers on a linked model: tables, a figure and a text in <recipe>/paper/."""


def _effort_options(command: Callable[..., None]) -> Callable[..., None]:
    defaults = {"n_tokens": 8192, "n_pairs": 6, "n_targets": 150, "n_contexts": 32, "n_exhaustive": 20, "seed": 0}
    meaning = {
        "n_tokens": "held-out tokens on which firing is looked at",
        "n_pairs": "layers or pairs of layers, spread over the depth",
        "n_targets": "firing features tested per layer",
        "n_contexts": "held-out contexts that targets and losses come from",
        "n_exhaustive": "targets per pair for which every active predecessor is tried",
        "seed": "of every choice",
    }
    for name, default in reversed(defaults.items()):
        option = "--" + name.removeprefix("n_")
        command = click.option(option, name, default=default, show_default=True, help=meaning[name])(command)
    return command


def _command(name: str) -> click.Command:
    @recipe_option
    @artifacts_option
    @_effort_options
    @click.option("--force", is_flag=True, help="run although the result is there")
    @machine_options
    @quiet_option
    def command(recipe: str, artifacts: Path, force: bool, quiet: bool, **others: Any) -> None:
        machine = {key: others.pop(key) for key in ("device", "threads", "scheduler", "workers")}
        with progress_bars(quiet=quiet) as progress:
            context = run_context(progress=progress, **machine)
            found = make(name, artifacts / Path(recipe).stem, others, context, force=force)
        say(found.file(REPORT).read_text(encoding="utf-8"))
        say(f"{found.path}  (figure: {FIGURE})")

    command.__doc__ = EXPERIMENTS[name][2].capitalize() + "."
    return click.command(name)(command)


def make(name: str, root: Path, effort_fields: dict[str, int], context: RunContext, *, force: bool = False) -> Artifact:
    """The artifact of one experiment, made if it is not there. Raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    from pipeline.artifact import Artifact, digest_of
    from pipeline.flow.experiments import run_experiment, write_finding
    from pipeline.flow.experiments.subject import Effort
    from sae.errors import UserError

    try:
        effort = TypeAdapter(Effort).validate_python(effort_fields)
    except ValidationError as error:
        raise UserError("these numbers cannot be used", found=str(error)) from error
    inputs = {stage: _opened(stage, root / stage) for stage in INPUTS}
    digests = {stage: artifact.digest for stage, artifact in inputs.items()}
    kind, out = f"paper-{name}", root / "paper" / name
    config = dataclasses.asdict(effort)
    if force or not Artifact.is_current(out, digest_of(kind, SCHEMA, config, digests)):
        subject = _subject(inputs, effort, context)
        with Artifact.create(out, kind=kind, schema=SCHEMA, config=config, inputs=digests) as draft:
            finding = run_experiment(name, subject, effort)
            write_finding(finding, draft.path)
            draft.summary.update(finding.summary)
    return Artifact.open(out, kind=kind, schema=SCHEMA, mend=f"featureflow paper {name}")


def _opened(stage: str, path: Path) -> Artifact:
    from pipeline.artifact import Artifact
    from pipeline.stages import StageName

    module = StageName(stage).module
    return Artifact.open(path, kind=module.KIND, schema=module.SCHEMA)


def _subject(inputs: dict[str, Artifact], effort: Any, context: RunContext) -> Subject:
    """The linked model behind the artifacts. Tokens on which firing is looked at come after the contexts that targets
    come from, so that matchers fitted on the former are tested on others."""
    from data.store import ActivationStore
    from pipeline.collected import open_collected_model
    from pipeline.dictionaries import FOLDER
    from pipeline.flow.experiments.subject import Subject
    from pipeline.flow.sources import DictionaryFolder, HeldOutRows
    from pipeline.flow.tables import read_tables
    from pipeline.flow.validation import held_out_contexts
    from pipeline.stages.collect import STORE

    store = ActivationStore.open(inputs["collect"].path / STORE)
    return Subject(
        dictionaries=DictionaryFolder(inputs["train"].path / FOLDER),
        edges=read_tables(inputs["link"].path).edges,
        held_out=HeldOutRows(url=store.url, rows=_rows_after_contexts(store, effort)),
        open_model=lambda: open_collected_model(inputs["collect"], store, context),
        contexts=lambda model, n: held_out_contexts(model, store, n_contexts=min(n, _most_contexts(store))),
        progress=context.progress,
    )


def _rows_after_contexts(store: Any, effort: Any) -> Any:
    from sae.errors import UserError

    first = -(-store.validation_start // store.n_context) + min(effort.n_contexts, _most_contexts(store))
    kept = store.kept_rows("validation")
    rows = kept[kept >= first * store.n_context][: effort.n_tokens]
    if not len(rows):
        raise UserError(
            "the store has too few held-out tokens",
            where=store.url,
            expected=f"more than {first * store.n_context - store.validation_start} held-out rows",
            mend="raise collect.validation_fraction or collect.n_tokens",
        )
    return rows


def _most_contexts(store: Any) -> int:
    """At most half of the held-out contexts give targets."""
    return max(1, (store.n_rows - store.validation_start) // store.n_context // 2)


for _name in EXPERIMENTS:
    paper_commands.add_command(_command(_name))
