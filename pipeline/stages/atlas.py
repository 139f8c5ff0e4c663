"""Store, dictionaries and flow graph → the atlas: every feature described, labelled, and laid out
to browse.

1. Read vocabulary and unembedding of the language model.
2. Survey every dictionary over the store: statistics, examples, rules
   pipeline/describe/survey.py
3. Label features with held-out scores, inherit labels along the flow graph, write shards
   pipeline/describe/labels.py
4. Write what all sites share, and the tables
   pipeline/site/build.py

Inputs: collect and train artifacts; link and findings of lenses when there are any. Output:
`site/` (open `site/index.html`), `tables/`, `metrics.jsonl`. Cost: one encoding of all tokens at
every site; sites run in parallel processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
from annotated_types import Ge, Gt, Le
from pydantic import TypeAdapter, model_validator
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from data.model.spec import ModelSpec
from data.store import ActivationStore, RowFilters
from featureflow.errors import Command, UserError
from featureflow.settings import Settings
from featureflow.sites import Site, parse_site
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.describe.labels import Bar
from pipeline.describe.vocabulary import Vocabulary
from pipeline.describe.workshop import Workshop
from pipeline.findings import read_finding
from pipeline.run import STORE
from pipeline.saes import FOLDER
from pipeline.site.attach import carry_over
from pipeline.site.build import AtlasFacts, ModelFacts, build_atlas
from pipeline.site.figures import draw_atlas

KIND, SCHEMA = "atlas", SCHEMAS["atlas"]


class Config(Settings):
    """What the atlas shows and how labels are judged."""

    profile: Annotated[
        Literal["mini", "standard", "full"], Doc("how many examples a feature card shows")
    ] = "standard"
    title: Annotated[str, Doc("title of the atlas; empty for one made from the model's name")] = ""
    filters: Annotated[RowFilters, Doc("tokens left out of all statistics")] = RowFilters()
    holdout: Annotated[
        float, Gt(0), Le(0.9), Doc("share of documents on which labels are scored, never proposed")
    ] = 0.33
    choice: Annotated[
        float,
        Ge(0),
        Le(0.5),
        Doc("share of documents that decide which label a feature gets; it is scored on others"),
    ] = 0.17
    min_f1: Annotated[
        float, Ge(0), Le(1), Doc("F1 on those documents from which a rule is accepted as a label")
    ] = 0.6
    min_firings: Annotated[int, Ge(1), Doc("held-out firings that a score needs to count")] = 5
    cofiring_rows: Annotated[
        int, Ge(0), Doc("tokens on which co-firing inside a dictionary is counted")
    ] = 32_768
    precision: Annotated[
        Literal["bfloat16", "float32"],
        Doc("dtype of the encoder's and the projection's matrix product"),
    ] = "bfloat16"
    seed: Annotated[int, Ge(0), Doc("of the uniform samples and the held-out documents")] = 0

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.holdout + self.choice >= 1:
            raise ValueError(
                "holdout and choice must be below 1 together: labels are proposed on the rest"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the atlas describes. Without `link` there is no flow in it, without the evaluation
    lenses no reconstruction metrics."""

    collect: Artifact
    train: Artifact
    link: Artifact | None = None
    lenses: Mapping[str, Artifact] = field(default_factory=dict)


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Make the atlas. Raises UserError; a later run with the same config goes on with the sites
    this one finished."""
    with Artifact.create(
        out, kind=KIND, schema=SCHEMA, config=config, inputs=_digests(inputs)
    ) as draft:
        shop = workshop_of(config, inputs, draft)
        store = ActivationStore.open(shop.store)
        model = model_facts(inputs.collect, store, context)
        facts = AtlasFacts(
            title=config.title or f"{model.card['name']} · {len(shop.sites)} dictionaries",
            metrics=read_metrics(inputs.lenses),
            provenance=_digests(inputs),
        )
        headline = build_atlas(shop, model, facts, draft.path / "tables", context)
        carry_over(out, draft.path / "site", train=inputs.train.digest)
        (draft.path / "figures").mkdir(exist_ok=True)
        features = pd.read_parquet(draft.path / "tables" / "features.parquet")
        draw_atlas(features, draft.path / "figures" / "features_by_layer.png")
        draft.summary.update(headline)
        draft.write_metrics(headline)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def workshop_of(config: Config, inputs: Inputs, draft: Draft) -> Workshop:
    """Where everything lies. Raises UserError when there are no dictionaries."""
    folder = inputs.train.path / FOLDER
    sites = sorted(parse_site(path.parent.name) for path in folder.glob("*/sae.json"))
    if not sites:
        raise UserError(
            "there are no dictionaries to describe",
            where=str(folder),
            fix=Command("run", to="train"),
        )
    return Workshop(
        store=inputs.collect.path / STORE,
        dictionaries=folder,
        graph=None if inputs.link is None else inputs.link.path,
        work=draft.path / ".work",
        site_folder=draft.path / "site",
        sites=tuple(site.short for site in sites),
        n_latents=tuple(_n_latents(folder, site) for site in sites),
        filters=config.filters,
        holdout=config.holdout,
        choice=config.choice,
        seed=config.seed,
        precision=config.precision,
        profile=config.profile,
        bar=Bar(min_f1=config.min_f1, min_firings=config.min_firings),
        cofiring_rows=config.cofiring_rows,
        made_from=tuple(_digests(inputs).items()),
    )


def model_facts(collect: Artifact, store: ActivationStore, context: RunContext) -> ModelFacts:
    """Vocabulary and unembedding of the model whose activations the store holds."""
    spec = TypeAdapter(ModelSpec).validate_python(collect.config["model"])
    model = LanguageModel.open(spec, device="cpu", progress=context.progress)
    tokenizer = model.tokenizer
    n_tokens = max(tokenizer.n_tokens, 1)
    W_U, gain = model.unembedding()
    return ModelFacts(
        card={
            "name": model.name,
            "fingerprint": store.provenance.get("model_fingerprint", ""),
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "d_vocab": model.d_vocab,
            "n_context": store.n_context,
        },
        vocabulary=Vocabulary(
            tokens=[tokenizer.token_bytes(i) for i in range(n_tokens)],
            special=frozenset(tokenizer.special_ids),
        ),
        W_U=W_U,
        gain=gain,
    )


def read_metrics(findings: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """Headline metrics by site from the evaluation lenses; those they do not have are left out."""
    out: dict[str, dict[str, Any]] = {}
    for lens, table in (("reconstruction", "metrics"), ("loss-recovered", "losses")):
        if lens not in findings:
            continue
        rows = read_finding(findings[lens]).tables[table]
        for row in rows[rows["source"] == "train"].to_dict(orient="records"):
            named = {
                str(k): v for k, v in row.items() if isinstance(v, int | float) and not pd.isna(v)
            }
            site = out.setdefault(parse_site(str(row["site"])).short, {})
            site |= {k: round(float(v), 5) for k, v in named.items()}
    return out


def _n_latents(folder: Path, site: Site) -> int:
    return int(
        json.loads((folder / site.short / "sae.json").read_text(encoding="utf-8"))["n_latents"]
    )


def _digests(inputs: Inputs) -> dict[str, str]:
    named = {name: getattr(inputs, name) for name in ("collect", "train", "link")}
    named |= {f"lenses/{name}": finding for name, finding in inputs.lenses.items()}
    return {name: artifact.digest for name, artifact in named.items() if artifact is not None}
