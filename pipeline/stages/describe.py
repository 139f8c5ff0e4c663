"""Store, dictionaries and flow graph → every feature described: statistics, examples, labels.

1. Read vocabulary and unembedding of the language model.
2. Survey every dictionary over the store: statistics, examples, rules
   pipeline/describe/survey.py
3. Label features with held-out scores, inherit labels along the flow graph
   pipeline/describe/labels.py
4. Write the tables, and the numbers of the cards

Inputs: collect, train and link artifacts. Output: `tables/`, `sites/`, `about.json`, a figure.
Cost: one encoding of all tokens at every site; sites run in parallel processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from featureflow.figures import save
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe.build import describe_sites
from pipeline.describe.figures import draw_features
from pipeline.describe.jobs import Config, Job
from pipeline.run import STORE, Run
from pipeline.saes import FOLDER

KIND, SCHEMA = "describe", SCHEMAS["describe"]

__all__ = ["KIND", "SCHEMA", "Config", "Inputs", "job_of", "run"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What features are described from."""

    collect: Artifact
    train: Artifact
    link: Artifact


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Describe the features. Raises UserError; a later run with the same config goes on with the
    sites that this one finished."""
    digests = {name: artifact.digest for name, artifact in vars(inputs).items()}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        model = Run.of(vars(inputs), context=context).model
        job = job_of(config, inputs, draft.path / ".work")
        headline = describe_sites(job, model, draft.path, context)
        (draft.path / "figures").mkdir(exist_ok=True)
        features = pd.read_parquet(draft.path / "tables" / "features.parquet")
        save(draw_features(features), draft.path / "figures" / "features_by_layer")
        draft.summary.update(headline)
        draft.write_metrics(headline)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def job_of(config: Config, inputs: Inputs, work: Path) -> Job:
    """Where everything lies, for the workers."""
    return Job(
        store=inputs.collect.path / STORE,
        dictionaries=inputs.train.path / FOLDER,
        graph=inputs.link.path,
        work=work,
        config=config,
        made_from=tuple(artifact.digest for artifact in vars(inputs).values()),
    )
