"""`featureflow sae`: dictionaries from and to other tools' files."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.console import say, show_number, table


@click.group("sae", no_args_is_help=True)
def sae_commands() -> None:
    """Read, describe and convert dictionaries in other tools' formats."""


@sae_commands.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    default="auto",
    show_default=True,
    help="format, if it should not be recognised",
)
def info(path: Path, form: str) -> None:
    """Describe the dictionary at PATH (a file or folder of any known format)."""
    from sae.formats import read

    sae = read(path, format=form)
    rows = [
        ("latents", show_number(sae.n_latents)),
        ("width in, out", f"{sae.d_in}, {sae.d_out}"),
        ("activation", sae.activation.kind),
        *((key.replace("_", " "), show_number(value)) for key, value in sae.metadata.items()),
    ]
    for line in table(rows):
        say(line)


@sae_commands.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["native", "saelens"]), required=True, help="format to write"
)
@click.option("--format", "form", default="auto", show_default=True, help="format of SOURCE")
def convert(source: Path, out: Path, to: str, form: str) -> None:
    """Read the dictionary at SOURCE and write it to the folder OUT."""
    from sae import save_sae
    from sae.formats import read, write_saelens

    sae = read(source, format=form)
    if to == "native":
        save_sae(sae, out)
    else:
        write_saelens(sae, out)
    say(str(out))
