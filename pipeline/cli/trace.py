"""`featureflow trace "PROMPT"`: the causal flow of one prompt, or of many, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from pipeline.cli.options import device_option, of_a_run, quiet_option
from pipeline.console import progress_bars, say
from pipeline.context import RunContext
from pipeline.run import Run
from pipeline.trace.attribution import read_attribution
from pipeline.trace.batch import read_prompts, summary_lines
from pipeline.trace.counterfactual import counterfactual
from pipeline.trace.document import document_of, lines_of, with_flip
from pipeline.trace.kept import write_foreign, write_trace
from pipeline.trace.trace import TraceOptions


@click.command()
@click.argument("prompt", required=False)
@click.option("--answer", help="token to explain; default: the likeliest")
@click.option("--foil", help="token that it is compared with; default: the next likeliest")
@click.option("--feature", help="explain a feature on a token instead, such as L20/316@5")
@click.option("--cuts", help="sites to cut at, such as L2,L5,L8; default: every third layer")
@click.option(
    "--through",
    type=click.Choice(["saes", "transcoders"]),
    default="saes",
    help="the stream's SAEs, or the transcoders of every layer with patterns and scales held",
)
@click.option("--chat", is_flag=True, help="put the prompt into the model's chat template")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="trace every line of this file (texts, or JSON with prompt, answer, foil) and sum up",
)
@click.option(
    "--graph",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="keep an attribution graph (JSON of circuit-tracer or Neuronpedia) for the atlas",
)
@click.option("--share", default=0.8, help="of each cut's Σ|score| that is kept")
@click.option("--removed", default=24, type=click.IntRange(1), help="supernodes removed")
@click.option("--shown", default=12, type=click.IntRange(1), help="supernodes shown")
@click.option("--flip", is_flag=True, help="find the smallest change that makes it say the foil")
@click.option("--keep/--no-keep", default=True, help="write it into the run's folder traces/")
@device_option
@quiet_option
@of_a_run
def trace(
    prompt: str | None,
    answer: str | None,
    foil: str | None,
    feature: str | None,
    cuts: str | None,
    through: Literal["saes", "transcoders"],
    chat: bool,
    prompts: Path | None,
    graph: Path | None,
    share: float,
    removed: int,
    shown: int,
    flip: bool,
    keep: bool,
    device: str,
    quiet: bool,
    folder: Path,
) -> None:
    """Say which features made the model go on with its next token after PROMPT.

    One gradient finds candidates; each is then really removed. Every trace prints its checks."""
    if [prompt, prompts, graph].count(None) != 2:
        raise click.UsageError("give one of: a PROMPT, a file with --prompts, a graph with --graph")
    if graph is not None:
        say(str(write_foreign(read_attribution(graph), Run.open(folder)).path))
        return
    given: dict[str, Any] = {"answer": answer, "foil": foil, "feature": feature, "chat": chat}
    asked = [{"prompt": prompt}] if prompts is None else read_prompts(prompts)
    options = TraceOptions(through=through, share=share, n_removed=removed, n_shown=shown)
    documents = []
    with progress_bars(quiet=quiet) as progress:
        context = RunContext(device=device, progress=progress)
        run = Run.open(folder, context=context)
        for each in asked:
            chosen = {**given, **{k: v for k, v in each.items() if k != "family"}}
            found = run.trace(**chosen, cuts=cuts.split(",") if cuts else (), options=options)
            documents.append(document_of(found, run, chosen["prompt"], chat=chosen["chat"]))
            if flip:
                change = counterfactual(found, progress=progress)
                documents[-1] = with_flip(documents[-1], change)
            kept = write_trace(found, documents[-1], run).path if keep else None
            if prompts is not None:
                say(f"{len(documents)} of {len(asked)}: {chosen['prompt']}")
            else:
                for line in lines_of(documents[-1]):
                    say(line)
            if kept:
                say(str(kept))
    if prompts is not None:
        for line in summary_lines(documents):
            say(line)
