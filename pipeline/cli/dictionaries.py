"""`featureflow sae`: dictionaries from and to other tools' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Folder, Gguf, HuggingFace, Packaged
from data.text.corpus import TextFiles
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.cli.options import PATH
from pipeline.console import say, show_number, table
from pipeline.run import Run
from pipeline.training.checking import check_dictionary
from sae import Sae, save_sae
from sae.calibration import with_threshold
from sae.formats import (
    Conventions,
    read,
    read_cross_layer,
    save_cross_layer,
    write_circuit_tracer,
    write_saelens,
    write_sparsify,
)
from sae.formats.cross_layer import is_cross_layer

_N_ROWS = 8192


@click.group("sae", no_args_is_help=True)
def sae_commands() -> None:
    """Read, describe and convert dictionaries in other tools' formats."""


format_option = click.option(
    "--format",
    "form",
    default="auto",
    help="format, if it should not be recognised; a class after a colon, as in "
    "dictionary_learning:BatchTopKSAE",
)
conventions_options = (
    click.option(
        "--centred/--not-centred",
        default=None,
        help="whether the stream was centred, where the files do not say it (GPT-2)",
    ),
    click.option(
        "--input-scale", type=float, help="scale of the activations, where no file has it"
    ),
)


def _with_conventions(command: Any) -> Any:
    for option in (*reversed(conventions_options), format_option):
        command = option(command)
    return command


@sae_commands.command()
@click.argument("path", type=PATH)
@_with_conventions
@click.option("--model", help="a model: a folder, a .gguf file, smollm2-135m, or a name on the Hub")
@click.option("--run", "run", type=PATH, help="or a run, whose model is used")
@click.option("--site", help="where it is used, if its files do not say it: L12, L12.mlp")
@click.option("--reads", help="what a transcoder reads, if its files do not say it: L12.mlp_in")
@click.option("--text", type=PATH, help="a text file  [default: bundled]")
@click.option("--tokens", default=4096, help="tokens to run the model over")
def check(
    path: Path,
    form: str,
    centred: bool | None,
    input_scale: float | None,
    model: str | None,
    run: Path | None,
    site: str | None,
    reads: str | None,
    text: Path | None,
    tokens: int,
) -> None:
    """Say what the dictionary at PATH is: format, site, scale, conventions. With --model or --run,
    measure its L0 and FVU on text beside the published L0."""
    found = check_dictionary(
        path,
        format=form,
        conventions=Conventions(centred=centred, input_scale=input_scale),
        site=parse_site(site) if site else None,
        reads=parse_site(reads) if reads else None,
        model=_model(model, run),
        text=TextFiles(paths=(str(text),)) if text else None,
        n_tokens=tokens,
    )
    for line in table([(name, show_number(value)) for name, value in found.described.items()]):
        say(line)
    for row in found.measured:
        say(
            f"{row['reading']}: L0 {row['L0']:.1f}, FVU {row['FVU']:.3f} ({row['n_tokens']} tokens)"
        )
    for note in found.notes:
        say(f"note: {note}")


def _model(name: str | None, run: Path | None) -> Any:
    """The model that the options name, if they name one."""
    if name is not None and run is not None:
        raise click.UsageError("--model and --run are not said together")
    if run is not None:
        return Run.open(run).model
    if name is None:
        return None
    if Path(name).is_dir():
        return LanguageModel.open(Folder(path=Path(name)), dtype="float32")
    if name.endswith(".gguf"):
        return LanguageModel.open(Gguf(path=Path(name)), dtype="float32")
    spec = Packaged(name=name) if name == Packaged().name else HuggingFace(name=name)
    return LanguageModel.open(spec, dtype="float32")


@sae_commands.command()
@click.argument("sources", type=PATH, nargs=-1, required=True)
@click.argument("out", type=PATH)
@click.option(
    "--to",
    type=click.Choice(["native", "saelens", "sparsify", "circuit_tracer"]),
    required=True,
    help="format to write; a set for circuit_tracer takes one SOURCE for every layer",
)
@click.option(
    "--run",
    type=PATH,
    help="run whose stored activations give a TopK set of circuit_tracer its thresholds",
)
@_with_conventions
def convert(
    sources: tuple[Path, ...],
    out: Path,
    to: str,
    run: Path | None,
    form: str,
    centred: bool | None,
    input_scale: float | None,
) -> None:
    """Read the dictionary at each of SOURCES and write it to the folder OUT."""
    if len(sources) > 1 and to != "circuit_tracer":
        raise click.UsageError(f"one SOURCE for --to {to}")
    if to == "native" and is_cross_layer(sources[0]):
        save_cross_layer(read_cross_layer(sources[0]), out)
        return say(str(out))
    conventions = Conventions(centred=centred, input_scale=input_scale)
    saes = [read(source, format=form, conventions=conventions) for source in sources]
    if to == "circuit_tracer":
        sites = [sae.metadata.get("site") for sae in saes]
        if None in sites or len(set(sites)) < len(sites):
            raise UserError(
                "a set has one dictionary a layer, each with its site",
                found=", ".join(f"{s}: {at}" for s, at in zip(sources, sites, strict=True)),
            )
        if run is not None:
            saes = [_with_threshold(sae, run) for sae in saes]
        write_circuit_tracer(dict(zip(map(parse_site, map(str, sites)), saes, strict=True)), out)
    elif to == "native":
        save_sae(saes[0], out)
    elif to == "sparsify":
        write_sparsify(saes[0], out)
    else:
        write_saelens(saes[0], out)
    say(str(out))


def _with_threshold(sae: Sae, root: Path) -> Sae:
    """A TopK transcoder with thresholds, fitted on held-out rows of what it reads."""
    if sae.activation.kind != "topk" or "reads" not in sae.metadata:
        return sae
    store, reads = Run.open(root).store, parse_site(sae.metadata["reads"])
    rows = store.kept_rows("validation")[:_N_ROWS]
    x = torch.from_numpy(store.read(reads, int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]])
    return with_threshold(sae, x)
