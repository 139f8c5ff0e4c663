"""`featureflow steer plan | design | remove | contrast | calibrate`: make plans from a feature,
from texts or words, or from a plan file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from pipeline.cli.flow import labels_beside
from pipeline.cli.options import PATH, device_option, of_a_run
from pipeline.console import say, show_number
from pipeline.context import RunContext
from pipeline.lenses.base import run_lens
from pipeline.lenses.output_sketch import read_sketch
from pipeline.lenses.steering import designs
from pipeline.lenses.steering.contrast import features_of_contrast, plan_by_difference, read_lines
from pipeline.lenses.steering.removal_trial import removal_lines
from pipeline.run import Run
from steering.edits import edit_named
from steering.plan import Plan
from steering.plan_files import write_plan
from steering.schedules import schedule_named

_SCHEDULES = ("constant", "linear", "exponential", "cosine_product", "gaussian")
_dose = click.option(
    "--dose", default=0.3, help="nats of KL to the unsteered model on neutral text"
)
_LITTLE = 0.01
_SUFFIXES = (".toml", ".json", ".safetensors")


def _writable(ctx: click.Context, parameter: click.Parameter, path: Path) -> Path:
    """Looked at before the model is loaded: minutes of calibration are not lost to a misspelt
    folder."""
    if path.suffix not in _SUFFIXES:
        raise click.BadParameter(f"{path} has no form of a plan: {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise click.BadParameter(f"{path.parent} is no folder that can be written into")
    return path


_out = click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    callback=_writable,
    help="plan to write: .toml, .json or .safetensors",
)


@click.command()
@click.argument("feature")
@click.option("--along", type=click.Choice(["flow", "layer"]), default="flow", help="where to push")
@click.option(
    "--edit",
    default="add",
    help="what is done to it: add, clamp, floor, cap, rescale, ablate, mean_ablate, project_out, "
    "rotate, or an edit of an installed package",
)
@click.option(
    "--schedule", type=click.Choice(_SCHEDULES), default="constant", help="shares by layer"
)
@click.option("--before", default=3, help="layers of the flow before the feature's own")
@click.option("--after", default=5, help="layers of the flow after the feature's own")
@_dose
@click.option(
    "--strength",
    type=float,
    help="take this strength and calibrate nothing; for suppression, 1 is all",
)
@_out
@device_option
@of_a_run
def plan(
    feature: str,
    along: Literal["flow", "layer"],
    edit: str,
    schedule: str,
    before: int,
    after: int,
    dose: float,
    strength: float | None,
    out: Path,
    device: str,
    folder: Path,
) -> None:
    """Make a plan for FEATURE along its flow, at the strength that gives the dose."""
    steering = Run.open(folder, context=RunContext(device=device)).steering
    made = steering.plan(
        feature,
        along=along,
        edit=edit_named(edit),
        schedule=schedule_named(schedule),
        dose=dose if strength is None else None,
        n_before=before,
        n_after=after,
    )
    _write(made if strength is None else made.with_strength(strength), out)


@click.command()
@click.argument("feature")
@click.option("--every", default=1, help="remove every n-th step of the flow only")
@click.option("--where-active", is_flag=True, help="only on tokens where FEATURE itself is active")
@click.option("--unread", is_flag=True, help="write the plan and measure nothing")
@_out
@device_option
@of_a_run
def remove(
    feature: str, every: int, where_active: bool, unread: bool, out: Path, device: str, folder: Path
) -> None:
    """Make a plan that removes FEATURE along its whole flow, and say what is left of it for readers
    that are not of the flow, and what else changes."""
    run = Run.open(folder, context=RunContext(device=device))
    made = run.remove(feature, every=every, where_active=where_active)
    _write(made, out)
    if not unread:
        for line in removal_lines(run, made, feature):
            say(line)


@click.command()
@click.argument("topical", type=PATH)
@click.argument("other", type=PATH)
@click.option(
    "--by",
    type=click.Choice(["auroc", "d-prime", "difference"]),
    default="auroc",
    help="rank features by AUROC or d′, or add the difference of means",
)
@click.option(
    "--layers", help="layers of the difference of means, such as 12,13,14; default: the middle one"
)
@click.option("--candidates", default=32, help="features that are asked for their output side")
@_dose
@_out
@device_option
@of_a_run
def contrast(
    topical: Path,
    other: Path,
    by: Literal["auroc", "d-prime", "difference"],
    layers: str | None,
    candidates: int,
    dose: float,
    out: Path,
    device: str,
    folder: Path,
) -> None:
    """Make a plan that pushes towards the texts in TOPICAL and away from those in OTHER (one text a
    line)."""
    texts = read_lines(topical), read_lines(other)
    run = Run.open(folder, context=RunContext(device=device))
    steering = run.steering
    if by == "difference":
        made = plan_by_difference(
            steering, *texts, _layers(layers, sorted(s.layer for s in steering.saes)), dose=dose
        )
        _write(replace(made, name=f"{topical.stem} against {other.stem}, difference of means"), out)
        return
    found = features_of_contrast(
        steering, *texts, by="auroc" if by == "auroc" else "d_prime", n_best=candidates
    )
    label_of = labels_beside(run) or (lambda name: "")
    for each in found[:5]:
        c = each.contrast
        say(
            f"{c.feature!s:>10}  AUROC {c.auroc:.2f}  d′ {c.d_prime:.2f}  is active on "
            f"{c.active_rate:.0%} of the texts"
            f"  {each.output.on_target_share:.1%} of a push goes to their words  "
            f"{label_of(str(c.feature))}".rstrip()
        )
    if found[0].output.on_target_share < _LITTLE:
        say(
            f"note: each moves less than {_LITTLE:.0%} of its push to the words in which the texts "
            "differ: these"
        )
        say(
            "      features read the topic rather than write it; more texts may find others, or "
            "try --by difference"
        )
    best = found[0].contrast.feature
    made = steering.plan(best, dose=dose)
    _write(replace(made, name=f"{topical.stem} against {other.stem}, {made.name}"), out)


@click.command()
@click.option("--texts", type=PATH, help="texts of the topic, one a line")
@click.option("--against", type=PATH, help="texts of the same kind without it")
@click.option("--words", help="words instead of texts, such as cat,dog,horse")
@click.option(
    "--feature", "features", multiple=True, help="a feature instead; several for a supernode"
)
@click.option("--k", default=8, help="features pushed at most")
@click.option("--layers", help="first and last layer, such as 10-20; 14 for one")
@click.option("--along", help="members of the flow of this feature only")
@click.option("--dense", is_flag=True, help="one vector, not features: what features cost")
@click.option("--dose", default=0.15, help="nats of KL to the unsteered model on neutral text")
@_out
@device_option
@of_a_run
def design(
    texts: Path | None,
    against: Path | None,
    words: str | None,
    features: tuple[str, ...],
    k: int,
    layers: str | None,
    along: str | None,
    dense: bool,
    dose: float,
    out: Path,
    device: str,
    folder: Path,
) -> None:
    """Make a plan that pushes the features with the most effect for the dose, and say what it
    should do beside what it does. The first call of a run sketches its output (minutes)."""
    if sum((texts is not None, words is not None, bool(features))) != 1:
        raise click.UsageError("give one of --texts with --against, --words, --feature")
    if (texts is None) != (against is None):
        raise click.UsageError("--texts and --against belong together")
    sets = [read_lines(path) for path in (texts, against) if path is not None]
    options = designs.DesignOptions(k=k, layers=_span(layers), along=along, dense=dense, dose=dose)
    run = Run.open(folder, context=RunContext(device=device))
    run_lens("output-sketch", run)
    sketch = read_sketch(run)
    if sets:
        aim = designs.aim_of_texts(run, sketch, *sets)
    elif words is not None:
        listed = [word.strip() for word in words.split(",") if word.strip()]
        aim = designs.aim_of_words(run, sketch, listed)
    else:
        aim = designs.aim_of_features(run, sketch, features)
    made = designs.design(run, sketch, aim, options)
    for line in designs.lines_of(made):
        say(line)
    _write(replace(made.plan, name=out.stem), out)


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise click.UsageError(f"--layers takes a span such as 10-20, not {text!r}") from None


@click.command()
@click.argument("plan_path", type=PATH)
@_dose
@_out
@device_option
@of_a_run
def calibrate(plan_path: Path, dose: float, out: Path, device: str, folder: Path) -> None:
    """Find the strength at which a plan (written by hand, say) gives the dose, and write it with
    that strength."""
    steering = Run.open(folder, context=RunContext(device=device)).steering
    _write(steering.calibrated(steering.signed(steering.read_plan(plan_path)), dose), out)


def _layers(text: str | None, known: list[int]) -> list[int]:
    if text is None:
        return [known[len(known) // 2]]
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise click.UsageError(f"--layers takes numbers such as 12,13,14, not {text!r}") from None


def _write(made: Plan, out: Path) -> None:
    dose = "not calibrated" if made.dose is None else f"dose {show_number(made.dose)}"
    say(f"{write_plan(made, out)}: {len(made.nodes)} nodes, strength {made.strength:.4g}, {dose}")
