"""`featureflow finetune`: a second model to compare with, changed by a short training on a text."""

from __future__ import annotations

from pathlib import Path

import click

from data.model.finetuning import finetune, save_model
from data.model.language_model import LanguageModel
from data.text.corpus import PackagedText
from featureflow.errors import UserError
from pipeline.cli.options import quiet_option
from pipeline.console import progress_bars, say
from pipeline.stages.recipe import read_recipe


@click.command("finetune")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recipe", default="laptop", help="whose model")
@click.option("--text", default="recipes", help="a packaged text")
@click.option("--blocks", default=4, type=click.IntRange(1), help="last blocks that learn")
@click.option("--steps", default=60, type=click.IntRange(1), help="steps of 512 tokens")
@click.option("--rate", default=1e-4, help="learning rate, which falls to 0")
@quiet_option
def finetune_command(
    out: Path, recipe: str, text: str, blocks: int, steps: int, rate: float, quiet: bool
) -> None:
    """Train the last blocks of a recipe's model on a text and save it in the folder OUT.

    `featureflow lens shift --other OUT` says what that changed.
    """
    if out.exists():
        raise UserError("there is something in the way", where=str(out), fix="choose another OUT")
    spec = read_recipe(recipe, stages=["collect"]).configs["collect"].model
    model = LanguageModel.open(spec, dtype="float32")
    if blocks > model.n_layers:
        raise UserError("not so many blocks", where="--blocks", expected=f"1 to {model.n_layers}")
    corpus = PackagedText(name=text)
    with progress_bars(quiet=quiet) as progress:
        first, last = finetune(
            model, corpus, n_blocks=blocks, steps=steps, learning_rate=rate, progress=progress
        )
    save_model(model, out)
    say(f"{out}: loss {first:.3f} on the first batches, {last:.3f} on the last")
