"""`featureflow flow`: ask the flow graph in the terminal, draw it, export it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

from featureflow.errors import UserError
from featureflow.figures import save
from pipeline.cli.options import PATH, of_a_run
from pipeline.console import complain, say, show_number, table
from pipeline.flow.describe import describe_flow
from pipeline.flow.exports import export_graph
from pipeline.flow.figures import draw_flow
from pipeline.flow.graph import FlowGraph
from pipeline.run import Run


@click.group("flow", no_args_is_help=True)
def flow_commands() -> None:
    """Ask the flow graph: show a feature, draw it, list the longest flows, export."""


@flow_commands.command()
@click.argument("feature")
@of_a_run
def show(feature: str, folder: Path) -> None:
    """Print where FEATURE (such as L12/402) comes from, how long it lasts and where it goes."""
    run = Run.open(folder)
    say(describe_flow(_graph(run), feature, label_of=labels_beside(run)))
    for line in _mixtures(run, feature):
        say(line)


@flow_commands.command()
@click.argument("feature")
@click.option("--out", type=PATH, required=True, help="picture to write: .png, .svg or .pdf")
@click.option("--hops", default=3, help="links away from the feature that are shown")
@of_a_run
def figure(feature: str, out: Path, hops: int, folder: Path) -> None:
    """Draw the flow through FEATURE."""
    run = Run.open(folder)
    save(draw_flow(_graph(run), feature, label_of=labels_beside(run), max_hops=hops), out)
    say(str(out))


@flow_commands.command()
@click.option("-n", "n", default=20, help="how many")
@of_a_run
def trunks(n: int, folder: Path) -> None:
    """List the longest strong flows of the graph."""
    run = Run.open(folder)
    label_of = labels_beside(run) or (lambda name: "")
    rows = []
    for trunk in _graph(run).trunks(n):
        first, middle, last = (str(trunk.features[i]) for i in (0, trunk.length // 2, -1))
        rows.append(
            (
                f"{first} … {last}",
                f"{trunk.length} layers",
                show_number(trunk.weakest),
                label_of(middle),
            )
        )
    for line in table(rows):
        say(line)


@flow_commands.command()
@click.argument("out", type=PATH)
@click.option("--around", default=None, help="only the flow through this feature")
@click.option("--hops", default=None, type=int, help="only so many links away from it")
@of_a_run
def export(out: Path, around: str | None, hops: int | None, folder: Path) -> None:
    """Write the graph to OUT: .graphml, .gexf, .cyjs (Cytoscape) or .json (attribution graph)."""
    run = Run.open(folder)
    label_of = labels_beside(run)
    labels = {} if label_of is None else run.labels
    say(str(export_graph(_graph(run), out, around=around, max_hops=hops, labels=labels)))


def _mixtures(run: Run, feature: str) -> Iterator[str]:
    """What the lens `transformations` found of the feature, where it looked."""
    try:
        members = run.lens("transformations").tables["members"]
    except UserError:
        return
    for end, other, verb in (("target", "source", "from"), ("source", "target", "into")):
        own = members[members[f"{end}_feature"] == feature]
        for kind, rows in own.groupby("kind", sort=False):
            parts = zip(rows[f"{other}_feature"], rows["weight"], strict=True)
            told = " + ".join(f"{name} ({weight:.2f})" for name, weight in parts)
            share = rows["explained_share"].iloc[0]
            yield f"\n{kind} {verb}:  {told}   explained {share:.2f}"


def _graph(run: Run) -> FlowGraph:
    """The graph, also when its features are not those of the dictionaries beside it: it can be read
    all the same."""
    graph = FlowGraph.open(run.root / "link")
    run.add_effects(graph)
    try:
        run.artifact("link")
    except UserError as error:
        complain(f"note: this graph is not that of the dictionaries beside it\n{error}")
    return graph


def labels_beside(run: Run) -> Callable[[str], str] | None:
    """Labels of the features, when they were described from this graph."""
    try:
        return run.features.label_of
    except UserError:
        return None
