"""`featureflow store`: look into an activation store, verify it, measure it again, import one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from data.store.checks import describe_store, recount_store, verify_store
from data.store.importing import import_activations
from pipeline.cli.options import THERE, machine_options, quiet_option, run_context
from pipeline.console import complain, progress_bars, say, show_number, table


@click.group("store", no_args_is_help=True)
def store_commands() -> None:
    """Look into an activation store, verify it, measure it again, or import one."""


@store_commands.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
def info(url: str, as_json: bool) -> None:
    """Say what the store at URL (a path, s3://…, gs://…) holds; also one that is not finished."""
    found = describe_store(url)
    if as_json:
        say(json.dumps(found, indent=1))
        return
    rows = [
        (key.replace("_", " "), show_number(value))
        for key, value in found.items()
        if key not in ("sites", "provenance")
    ]
    rows += [
        (key.replace("_", " "), show_number(value)) for key, value in found["provenance"].items()
    ]
    for line in table(rows):
        say(line)
    say("sites")
    for site in found["sites"]:
        say(
            "  "
            + (
                site
                if isinstance(site, str)
                else ", ".join(f"{k} {show_number(v)}" for k, v in site.items())
            )
        )


@store_commands.command()
@click.argument("url")
@click.option("--full", is_flag=True, help="also read every byte and compare checksums")
@machine_options
@quiet_option
@click.pass_context
def verify(ctx: click.Context, url: str, full: bool, quiet: bool, **machine: Any) -> None:
    """Check the store at URL against its records; every damage is named, with the command that
    fixes it."""
    with progress_bars(quiet=quiet) as progress:
        report = verify_store(url, full, run_context(progress=progress, **machine))
    say(
        f"{report.url}: {report.n_shards} shards, {report.n_files} files, "
        f"{show_number(report.n_bytes / 1e9)} GB"
    )
    for name, lost in report.variance_lost.items():
        say(f"{name}: int8 lost at most {show_number(lost)} of a chunk's variance")
    if report.is_sound:
        say("sound" + ("" if full else " (names and sizes; --full reads every byte)"))
        return
    try:
        report.raise_if_damaged()
    except Exception as error:
        complain(f"error: {error}")
    ctx.exit(2)


@store_commands.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
@machine_options
@quiet_option
@click.pass_context
def statistics(ctx: click.Context, url: str, as_json: bool, quiet: bool, **machine: Any) -> None:
    """Measure every site of the store at URL again from its rows, and compare with what was
    gathered while writing."""
    with progress_bars(quiet=quiet) as progress:
        found = recount_store(url, run_context(progress=progress, **machine))
    rows = [
        {
            "site": name,
            "n": each.n,
            "median_norm": each.median_norm,
            "total_variance": each.total_variance,
            "n_non_finite": each.n_non_finite,
        }
        for name, each in found.statistics.items()
    ]
    if as_json:
        say(json.dumps({"sites": rows, "as_gathered": not found.problems}, indent=1))
    else:
        for row in rows:
            say(
                "  "
                + ", ".join(
                    f"{key.replace('_', ' ')} {show_number(value)}" for key, value in row.items()
                )
            )
    if found.problems:
        complain("error: " + "; ".join(f"{each.where}: {each.what}" for each in found.problems))
        ctx.exit(2)
    if not as_json:
        say("the same as gathered while writing")


@store_commands.command("import")
@click.argument("source", type=THERE)
@click.argument("url")
@click.option(
    "--rename",
    multiple=True,
    metavar="NAME=SITE",
    help="name found in SOURCE and the site it is, e.g. acts=L12",
)
@click.option(
    "--ignore", multiple=True, metavar="NAME", help="array in SOURCE that is left out; repeatable"
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32", "int8"]), default="bfloat16"
)
@click.option(
    "--context",
    "n_context",
    default=None,
    type=int,
    help="rows of one context, where SOURCE does not say",
)
@click.option("--validation", default=0.05, help="share of the contexts set apart")
@machine_options
@quiet_option
def import_(
    source: Path,
    url: str,
    rename: tuple[str, ...],
    ignore: tuple[str, ...],
    dtype: Any,
    n_context: int | None,
    validation: float,
    quiet: bool,
    **machine: Any,
) -> None:
    """Store the activations in SOURCE (SAELens' cache, a folder of safetensors or .npy, a Zarr
    array) at URL."""
    if wrong := [pair for pair in rename if "=" not in pair]:
        raise click.UsageError(f"--rename takes NAME=SITE, not {', '.join(wrong)}")
    with progress_bars(quiet=quiet) as progress:
        report = import_activations(
            source,
            url,
            run_context(progress=progress, **machine),
            dtype=dtype,
            rename=dict(pair.split("=", 1) for pair in rename),
            ignore=ignore,
            n_context=n_context,
            validation_fraction=validation,
        )
    say(f"{report.url}: {report.n_shards} shards, {show_number(report.n_bytes / 1e9)} GB, sound")
