"""`featureflow atlas find | read`: features about a word, and those active on a text, in the
terminal."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import artifacts_option, recipe_option, run_folder
from pipeline.console import say, show_number, table


@click.command()
@click.argument("word")
@click.option("-n", "n", default=20, show_default=True, help="how many are shown")
@click.option("--site", "short", default=None, help="only in this dictionary, such as L12")
@recipe_option
@artifacts_option
def find(word: str, n: int, short: str | None, recipe: str, artifacts: Path) -> None:
    """List features about WORD: in their label, the tokens they are most active on, or the tokens
    they promote.

    WORD may be the beginning of a word. Accepted labels come first, by held-out score (F1)."""
    from featureflow.sites import parse_site
    from pipeline.describe.asking import find_features
    from pipeline.run import Run

    features = Run.open(run_folder(artifacts, recipe)).features
    found = find_features(features, word, site=None if short is None else parse_site(short))
    rows = [
        (
            f.feature,
            f"F1 {f.score:.2f}",
            f"on {show_number(100 * f.density)} % of tokens",
            ", ".join("active on it" if w == "tokens" else w for w in f.where),
            f.label,
        )
        for f in found[:n]
    ]
    for line in table(rows):
        say(line)
    say(
        f"{min(n, len(found))} of {len(found)} features shown"
        if found
        else f"no feature is about {word!r}"
    )


@click.command()
@click.argument("text")
@click.option("-n", "n", default=3, show_default=True, help="features a token, strongest first")
@click.option(
    "--site",
    "short",
    default=None,
    help="dictionary, such as L12; default: the middle residual one",
)
@click.option("--device", default="cpu", show_default=True, help="torch device of the model")
@recipe_option
@artifacts_option
def read(text: str, n: int, short: str | None, device: str, recipe: str, artifacts: Path) -> None:
    """Show which features are active on TEXT, token by token, at one site.

    The percentage is the activation as a share of the feature's largest on the corpus."""
    from featureflow.sites import parse_site
    from pipeline.context import RunContext
    from pipeline.describe.asking import read_text
    from pipeline.run import Run

    run = Run.open(run_folder(artifacts, recipe), context=RunContext(device=device))
    site = None if short is None else parse_site(short)
    rows = []
    run.need("collect", "train", "describe")
    for token in read_text(run.model, run.features, run.saes, text, site=site, n=n):
        name = repr(token.text)
        for firing in token.firings:
            rows.append((name, str(firing.feature), f"{100 * firing.share:.0f} %", firing.label))
            name = ""
        if not token.firings:
            rows.append((name, "–", "", "no latent is active"))
    for line in table(rows):
        say(line)


QUESTIONS = (find, read)
