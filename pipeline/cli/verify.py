"""`featureflow verify`: is the run in a folder whole and of one piece? Manifests, sizes, checksums,
digests, the store.

What is wrong is named with the command that fixes it; nothing is written.
"""

from __future__ import annotations

from pathlib import Path

import click

from data.store.checks import verify_store
from featureflow.errors import Command, Problem, UserError
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.cli.options import of_a_run
from pipeline.console import say, show_number, table
from pipeline.context import RunContext
from pipeline.findings import open_finding
from pipeline.run import STORE, misfits


@click.command()
@click.option("--quick", is_flag=True, help="compare names and sizes only, read no file")
@of_a_run
def verify(quick: bool, folder: Path) -> None:
    """Check a finished run: every file by its checksum, and that each stage was made from those
    beside it."""
    stages = [stage for stage in SCHEMAS if (folder / stage).exists()]
    stages += [
        f"lenses/{path.parent.name}" for path in sorted(folder.glob("lenses/*/manifest.json"))
    ]
    if not stages:
        raise UserError(
            "there is no run here",
            where=str(folder),
            expected=", ".join(SCHEMAS),
            fix=Command("run"),
        )
    found: dict[str, Artifact] = {}
    damage = {stage: _damage(folder, stage, found, quick=quick) for stage in stages}
    foreign = list(misfits(found))
    for line in table(
        [(stage, "DAMAGED" if damage[stage] else _contents(found[stage])) for stage in stages]
    ):
        say(line)
    damaged = [stage for stage in stages if damage[stage]]
    if damaged or foreign:
        words = [stage.replace("lenses/", "lens/").split("/") for stage in damaged]
        again = [Command(*each, force=True) for each in words]
        fix = (*again, *([Command("run")] if foreign else []))
        problems = (*(problem for stage in stages for problem in damage[stage]), *foreign)
        raise UserError(f"{folder} cannot be trusted", problems=problems, fix=fix)
    say(
        f"{folder}: sound"
        + (" (names and sizes; without --quick every byte is read)" if quick else "")
    )


def _damage(
    root: Path, stage: str, found: dict[str, Artifact], *, quick: bool
) -> tuple[Problem, ...]:
    """What is wrong with the files of one stage. The artifact goes to `found` if it can be
    opened."""
    try:
        found[stage] = (
            Artifact.open(root / stage, kind=stage, schema=SCHEMAS[stage])
            if stage in SCHEMAS
            else open_finding(root, Path(stage).name)
        )
        if stage == "collect":
            verify_store(root / stage / STORE, not quick, RunContext()).raise_if_damaged()
        if not quick:
            found[stage].verify()
    except UserError as error:
        return error.problems
    return ()


def _contents(artifact: Artifact) -> str:
    n_bytes = sum(entry["size"] for entry in artifact.files.values())
    return f"{show_number(len(artifact.files))} files, {show_number(n_bytes / 1e9)} GB"
