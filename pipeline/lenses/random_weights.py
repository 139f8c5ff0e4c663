"""Which numbers of this run would a model that learnt nothing give as well?

1. The run's language model, and one of the same shape with random weights, read the same text;
   activations of `n_layers` neighbouring residual sites in the middle, and of one layer's MLP and
   attention, are collected from both.
2. The same SAEs are trained on both (the run's recipe, `steps` steps), linked, tested by removal
   and described: the project's own stages, under `<run>/random-weights/<arm>`, kept.
3. The headline numbers of the two arms stand side by side, with 95 % intervals where there are
   any: over documents for removals, births and labels, over features for shares of links.

A claim is `earned` when the trained model's interval lies above that of the random one, and above
zero, by at least `margin`: two random models differ too, and less is no headline. What is not
earned says nothing of training: residual streams and TopK give it. Cost: twice a small run.
Source: this project's referee; random baselines for SAEs: Heap et al. (arXiv 2501.17727).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge
from pydantic import TypeAdapter
from typing_extensions import Doc

from data.model.sources import write_random_like
from data.model.spec import Folder, ModelSpec, Random
from featureflow.errors import UserError
from featureflow.sites import Site, residual_sites
from pipeline.artifact import Artifact, digest_of
from pipeline.describe.rules import wilson
from pipeline.findings import Finding
from pipeline.flow.validation import TOP_1, Validation
from pipeline.lenses import births, labels
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import NTargets
from pipeline.run import Run
from pipeline.stages import collect, describe, link, train
from pipeline.training.plan import Independent

TITLE = "headline numbers beside those of a model of the same shape with random weights"
NEEDS = ("collect", "train")
TRAINED, RANDOM = "trained", "random weights"
SHOWN = ("variance explained", "best cosine of links", "correlation of links")
"""Compared, but nothing is claimed of them: they have no interval over units that are independent.
Nor of removals as they are, only of what the model adds to them."""


class Config(Seeded):
    """How small the two runs are."""

    n_layers: Annotated[int, Ge(2), Doc("neighbouring residual layers, in the middle")] = 5
    n_tokens: Annotated[int, Ge(256), Doc("tokens collected from each model")] = 49_152
    steps: Annotated[int, Ge(1), Doc("optimizer steps of each SAE")] = 300
    n_targets: NTargets = 150
    margin: Annotated[float, Ge(0), Doc("by which a claim must stand above random weights")] = 0.02


def look(run: Run, config: Config) -> Finding:
    """Make both runs and compare them. Raises UserError when the text is not known."""
    models = _models(run, config)
    found = {}
    for arm, spec in models.items():
        run.context.progress(f"small run: {arm}", 0, 1)
        found[arm] = pd.DataFrame(_measured(_small_run(run, arm, spec, config), config))
    table = found[TRAINED].merge(found[RANDOM], on="quantity", suffixes=("_trained", "_random"))
    claimed = ~table["quantity"].isin(SHOWN) & ~table["quantity"].str.startswith("removal")
    above = table["low_trained"] >= np.maximum(table["high_random"], 0) + config.margin
    table["earned"] = np.where(claimed, np.where(above, "yes", "no"), "not claimed")
    n_earned = int((table["earned"] == "yes").sum())
    return Finding(
        tables={"summary": table},
        text=_text(table),
        headline={"n_claims": int(claimed.sum()), "n_earned": n_earned},
        figure=lambda: bars(
            table, by=["quantity"], columns={"value_trained": TRAINED, "value_random": RANDOM}
        ),
    )


def _models(run: Run, config: Config) -> dict[str, ModelSpec]:
    spec: ModelSpec = TypeAdapter(ModelSpec).validate_python(
        run.artifact("collect").config["model"]
    )
    if isinstance(spec, Random):
        other: ModelSpec = spec.replace(seed=spec.seed + config.seed + 1)
    else:
        folder = _folder(run) / f"model-{config.seed}"
        write_random_like(run.model.loaded, folder, seed=config.seed)
        other = Folder(path=folder)
    return {TRAINED: spec, RANDOM: other}


def _small_run(run: Run, arm: str, model: ModelSpec, config: Config) -> Run:
    """A run of four stages at few sites; stages that are current are left alone."""
    root = _folder(run) / arm.replace(" ", "-")
    how = collect.Config.model_validate(dict(run.artifact("collect").config))
    if how.imported is not None:
        raise UserError(
            "the text of an imported store is not known",
            where="collect.imported",
            found=how.imported,
        )
    sites = _sites(run, config.n_layers)
    n_tokens = min(config.n_tokens, how.n_tokens)
    made: dict[str, Artifact] = {}

    def stage(name: str, module: ModuleType, settings: Any, inputs: Mapping[str, str]) -> None:
        out = root / name
        if not Artifact.is_current(out, digest_of(module.KIND, module.SCHEMA, settings, inputs)):
            given = {key: made[key] for key in inputs if key in made}
            module.run(settings, module.Inputs(**given), out, run.context)
        made[name] = Artifact.open(out, kind=module.KIND, schema=module.SCHEMA)

    def digests(*names: str) -> dict[str, str]:
        return {name: made[name].digest for name in names}

    collected = how.replace(
        model=model,
        sites=sites,
        n_tokens=n_tokens,
        validation_fraction=max(how.validation_fraction, 0.15),
        store_url=None,
    )
    stage("collect", collect, collected, collect.outside_digests(collected))
    trained = train.Config.model_validate(dict(run.artifact("train").config)).replace(
        sites=sites, steps=config.steps, overrides=(), imported=None, initialisation=Independent()
    )
    stage("train", train, trained, digests("collect"))
    tested = Validation(n_residual_pairs=2, n_module_pairs=1, n_targets=config.n_targets)
    linked = link.Config(validation=tested, seed=config.seed)
    stage("link", link, linked, digests("collect", "train"))
    stage("describe", describe, describe.Config(), digests("collect", "train", "link"))
    return Run.open(root, context=run.context)


def _sites(run: Run, n_layers: int) -> tuple[str, ...]:
    """Residual sites in the middle of the model, and the modules of the layer in their middle."""
    n_blocks = run.model.n_layers
    first = max(0, (n_blocks - n_layers) // 2)
    last = min(n_blocks, first + n_layers)
    middle = (first + last) // 2
    modules = (Site(middle, "mlp_out"), Site(middle, "attn_out"))
    residual = [Site(layer, "resid_post") for layer in range(first, last)]
    return tuple(
        site.short for site in (*residual, *(s for s in modules if s in run.model.sites()))
    )


def _measured(small: Run, config: Config) -> Iterator[dict[str, Any]]:
    """The headline numbers of one arm."""
    residual = residual_sites(small.saes)
    facts = [small.saes.description(site)["metadata"] for site in residual]
    yield _row("variance explained", 1 - np.median([f["held_out_fvu"] for f in facts]))
    pairs = small.graph.pairs
    for relation in pairs["relation"].unique():
        own = pairs[pairs["relation"] == relation]
        kept, n = float(own["n_links"].sum()), float(own["n_targets"].sum())
        low, high = wilson(np.array([kept]), np.array([n]))
        yield _row(f"targets linked, {relation}", kept / n, low[0], high[0])
    own = pairs[pairs["relation"] == "residual"]
    yield _row("best cosine of links", own["cosine_median"].median())
    yield _row("correlation of links", own["pearson_median"].median())
    removed = pd.read_parquet(small.artifact("link").path / "causal_summary.parquet")
    top = removed[removed["strategy"] == TOP_1].set_index("relation")
    for relation, row in top.iterrows():
        yield _row("removal silences, " + str(relation), *_interval(row, "success"))
        yield _row("… by the model, " + str(relation), *_interval(row, "success_by_model"))
    yield _row("removal without the model", top.loc["residual", "success_no_model"])
    try:
        born = births.look(small, births.Config(n_pairs=2, n_targets=config.n_targets))
    except UserError:  # no feature begins between
        yield _row("births: own − other", 0.0, 0.0, 0.0)
    else:
        table = born.tables["summary"].set_index("arm")
        yield _row("births: own − other", *_interval(table.loc["own − other"], "change"))
    held = labels.look(small, labels.Config(seed=config.seed)).tables["summary"].iloc[0]
    yield _row("labels that hold", *_interval(held, "holding_share"))


def _interval(row: pd.Series, name: str) -> tuple[float, float, float]:
    return float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"])


def _row(quantity: str, value: float, low: float = np.nan, high: float = np.nan) -> dict[str, Any]:
    return {"quantity": quantity, "value": float(value), "low": float(low), "high": float(high)}


def _text(table: pd.DataFrame) -> str:
    lines = [
        f"  {row.quantity}: {row.value_trained:.3f} trained, {row.value_random:.3f} random weights"
        f" ({'earned' if row.earned == 'yes' else row.earned})"
        for row in table.itertuples()
    ]
    return (
        "A number that random weights give as well says nothing of what the model learnt.\n"
        + "\n".join(lines).replace("(no)", "(not earned)")
        + "\n\nEarned: the interval of the trained model lies clearly above that of the random "
        "one, and above zero."
    )


def _folder(run: Run) -> Path:
    return run.root / "random-weights"
