"""All that a run found → the atlas: pages to browse, which open by double click.

1. Features and labels come from the describe stage, flow from the link stage, metrics from the
   evaluation lenses, samples from the steer stage, second opinions from `opinions.json` beside
   them.
2. Every finding of a lens gets a page, and what it says of a feature stands on the feature's card.
3. Every trace in `traces/` beside the artifacts that was made from them gets a page.
4. Nothing is measured here; what is not there is not shown.

Output: `site/` (open `site/index.html`). Cost: gzip; sites run in parallel processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from typing_extensions import Doc

from featureflow.settings import Settings
from featureflow.sites import parse_site
from pipeline.artifact import SCHEMAS, Artifact, canonical_json
from pipeline.context import RunContext
from pipeline.describe.explain import read_opinions
from pipeline.describe.features import Features
from pipeline.findings import read_finding
from pipeline.flow.graph import FlowGraph
from pipeline.lenses.steering.tables import atlas_document
from pipeline.site.build import Shown, build_site
from pipeline.site.pages import Job
from pipeline.trace.kept import fitting_traces

KIND, SCHEMA = "atlas", SCHEMAS["atlas"]


class Config(Settings):
    """How the atlas presents itself."""

    title: Annotated[str, Doc("title of the atlas; empty for one made from the model's name")] = ""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the atlas shows; findings by the name of their lens."""

    train: Artifact
    link: Artifact
    describe: Artifact
    lenses: Mapping[str, Artifact] = field(default_factory=dict)
    steer: Artifact | None = None


def digests_beside(root: Path, available: Mapping[str, Artifact]) -> dict[str, str]:
    """What lies beside the artifacts and is shown too: the second opinions, and traces."""
    opinions = read_opinions(root, available["train"].digest)
    traces = {
        f"traces/{name}": trace.digest for name, trace in traces_beside(root, available).items()
    }
    return traces | ({"opinions": _sha256(opinions)} if opinions else {})


def traces_beside(root: Path, available: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The kept traces of a run that were made from these artifacts, and of foreign graphs."""
    stages = {name: available[name] for name in ("train", "link", "describe")}
    digests = dict(stages["train"].inputs) | {name: a.digest for name, a in stages.items()}
    return fitting_traces(root, digests)


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Make the atlas. Raises UserError."""
    digests = _digests(inputs) | digests_beside(out.parent, vars(inputs))
    features, graph = Features(inputs.describe.path), FlowGraph.open(inputs.link.path)
    model = features.about["model"]["name"]
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        shown = Shown(
            title=config.title or f"{model} · {len(features.sites)} dictionaries",
            described=inputs.describe.config,
            metrics=read_metrics(inputs.lenses),
            steering=None if inputs.steer is None else steering_document(inputs.steer, features),
            opinions=read_opinions(out.parent, inputs.train.digest),
            lenses=inputs.lenses,
            traces=traces_beside(out.parent, vars(inputs)),
            provenance={**inputs.describe.inputs, **digests},
        )
        job = Job(
            features=features.folder,
            graph=inputs.link.path,
            site_folder=draft.path / "site",
            made_from=tuple(digests.values()),
        )
        headline = build_site(features, graph, shown, job, context)
        draft.summary.update(headline)
        draft.write_metrics(headline)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def steering_document(steer: Artifact, features: Features) -> dict[str, Any]:
    """`attached/steering` of docs/decisions/0003-atlas-shards.md."""
    samples = pd.read_parquet(steer.file("samples.parquet"))
    effects = read_finding(steer).tables["effects"]
    labels = {name: features.label_of(name) for name in samples["feature"].unique()}
    schedule = steer.config["schedule"]["kind"]
    return atlas_document(samples, effects, labels, schedule=schedule, seed=steer.config["seed"])


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


def _digests(inputs: Inputs) -> dict[str, str]:
    named = {name: getattr(inputs, name) for name in ("train", "link", "describe", "steer")}
    named |= {f"lenses/{name}": finding for name, finding in inputs.lenses.items()}
    return {name: artifact.digest for name, artifact in named.items() if artifact is not None}


def _sha256(document: Any) -> str:
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()
