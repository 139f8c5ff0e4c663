"""`featureflow trace "PROMPT"`: the causal flow of one prompt, in the terminal."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli.options import artifacts_option, recipe_option, run_folder
from pipeline.console import say


@click.command()
@click.argument("prompt")
@click.option("--answer", help="token to explain; default: the likeliest")
@click.option("--foil", help="token that it is compared with; default: the next likeliest")
@click.option("--feature", help="explain a feature on a token instead, such as L20/316@5")
@click.option("--cuts", help="sites to cut at, such as L2,L5,L8; default: every third layer")
@click.option("--chat", is_flag=True, help="put the prompt into the model's chat template")
@click.option("--share", default=0.8, show_default=True, help="of each cut's Σ|score| that is kept")
@click.option(
    "--removed", default=24, show_default=True, type=click.IntRange(1), help="supernodes removed"
)
@click.option(
    "--shown", default=12, show_default=True, type=click.IntRange(1), help="supernodes shown"
)
@click.option("--keep/--no-keep", default=True, help="write it into the run's folder lenses/")
@click.option("--device", default="cpu", show_default=True, help="torch device of the model")
@recipe_option
@artifacts_option
def trace(
    prompt: str,
    answer: str | None,
    foil: str | None,
    feature: str | None,
    cuts: str | None,
    chat: bool,
    share: float,
    removed: int,
    shown: int,
    keep: bool,
    device: str,
    recipe: str,
    artifacts: Path,
) -> None:
    """Say which features made the model go on with its next token after PROMPT.

    One gradient finds candidates; each is then really removed. Every trace prints its checks."""
    from pipeline.context import RunContext
    from pipeline.run import Run
    from pipeline.trace.finding import write_trace
    from pipeline.trace.prompt import lines_of, trace_prompt
    from pipeline.trace.trace import TraceOptions

    run = Run.open(run_folder(artifacts, recipe), context=RunContext(device=device))
    found = trace_prompt(
        run,
        prompt,
        answer=answer,
        foil=foil,
        feature=feature,
        cuts=cuts.split(",") if cuts else (),
        chat=chat,
        options=TraceOptions(share=share, n_removed=removed, n_shown=shown),
    )
    for line in lines_of(found, run):
        say(line)
    if keep:
        say(str(write_trace(found, run, prompt).path))
