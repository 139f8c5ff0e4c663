"""Store, dictionaries and flow graph → every feature described: statistics, examples, labels.

1. Prepare: vocabulary and unembedding of the model, for every process.
2. Survey every dictionary over the store (pipeline/describe/survey.py): statistics, examples,
   rules; finished sites are kept on disk.
3. Label features with held-out scores (pipeline/describe/labels.py); labels are inherited along the
   flow graph, so this waits for all sites.
4. Join the tables, keep the numbers of the cards.

Inputs: collect, train and link artifacts. Output:

    tables/            features, labels, examples, tokens, documents, vocabulary
    sites/<short>.npz  the cards' numbers of one site (pipeline/describe/columns.py)
    about.json         model, names of sources and topics
    figures/           how often features are active, and how many have a label that held

Cost: one encoding of all tokens at every site; sites run in parallel processes, one in memory each.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from data.model.language_model import LanguageModel
from featureflow.errors import UserError
from featureflow.figures import save
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe import intermediate
from pipeline.describe.features import ABOUT, SITES
from pipeline.describe.jobs import (
    UNEMBEDDING,
    VOCABULARY,
    Config,
    Job,
    corpus_for,
    label_job,
    saes_for,
    store_for,
    survey_job,
)
from pipeline.describe.tables import write_tables
from pipeline.describe.vocabulary import Vocabulary
from pipeline.describe.workers import site_workers
from pipeline.run import STORE, Run
from pipeline.saes import FOLDER
from pipeline.stages.stage_figures import draw_features

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
        opened = Run.of(vars(inputs), context=context)
        model = None if opened.store.is_of_any_module else opened.model
        job = job_of(config, inputs, draft.path / ".work")
        prepare(job, model)
        sites = [site.short for site in saes_for(job)]
        with site_workers(context, len(sites)) as each_site:
            each_site("survey", partial(survey_job, job), sites)
            each_site("label", partial(label_job, job), sites)
        finish(job, sites, draft.path)
        write_about(job, model, draft.path)
        shutil.rmtree(job.work)
        features = pd.read_parquet(draft.path / "tables" / "features.parquet")
        (draft.path / "figures").mkdir(exist_ok=True)
        save(draw_features(features), draft.path / "figures" / "features_by_layer")
        headline = _headline(features, config.min_f1)
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


def prepare(job: Job, model: LanguageModel | None) -> None:
    """Leave in the work folder what every process needs of the model; of a module that is no
    language model, the names of its items."""
    job.work.mkdir(parents=True, exist_ok=True)
    if model is None:
        store = store_for(job)
        names = item_names(store.provenance.get("vocabulary"), store.tokens().id, store.url)
        Vocabulary(tokens=[name.encode() for name in names], special=frozenset()).save(
            job.work / VOCABULARY
        )
        return
    tokenizer = model.tokenizer
    vocabulary = Vocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(max(tokenizer.n_tokens, 1))],
        special=frozenset(tokenizer.special_ids),
    )
    vocabulary.save(job.work / VOCABULARY)
    W_U, gain = model.unembedding()
    hidden = sorted(vocabulary.special | set(range(len(vocabulary), len(W_U))))
    np.savez(
        job.work / UNEMBEDDING,
        weight=W_U.float().cpu().numpy(),
        gain=gain.float().cpu().numpy(),
        hidden=np.array(hidden, dtype=np.int64),
    )


def item_names(given: Any, ids: np.ndarray, where: str) -> list[str]:
    """What the ids of the token table mean: the `vocabulary` of the store's provenance, or numbers.
    Raises UserError for one that is too short."""
    n = int(ids.max()) + 1
    if given is None:
        return [f"item {number}" for number in range(n)]
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise UserError("the vocabulary is no list of names", where=where, found=repr(given)[:40])
    if len(given) < n:
        raise UserError(
            "ids of the token table have no name",
            where=f"{where}: provenance.vocabulary",
            expected=f"{n} names, for ids from 0 to {n - 1}",
            found=f"{len(given)} names",
        )
    return given


def finish(job: Job, sites: list[str], out: Path) -> None:
    """Join what the sites left."""
    (out / SITES).mkdir(parents=True, exist_ok=True)
    for short in sites:
        shutil.copyfile(intermediate.columns_path(job.work, short), out / SITES / f"{short}.npz")
    write_tables(out / "tables", [job.work / short for short in sites], corpus_for(job))


def write_about(job: Job, model: LanguageModel | None, out: Path) -> None:
    """Keep what the features are of."""
    corpus, store = corpus_for(job), store_for(job)
    about = {
        "model": {
            "name": store.provenance.get("model", "a module") if model is None else model.name,
            "fingerprint": store.provenance.get("model_fingerprint", ""),
            "n_layers": len(store.sites) if model is None else model.n_layers,
            "d_model": max(map(store.width, store.sites)) if model is None else model.d_model,
            "d_vocab": len(corpus.vocabulary) if model is None else model.d_vocab,
            "n_context": store.n_context,
        },
        "sources": list(corpus.sources),
        "labels": list(corpus.labels),
    }
    (out / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


def _headline(features: pd.DataFrame, min_f1: float) -> dict[str, Any]:
    """How much is described and labelled; of the accepted labels, how many hold on the documents
    that chose nothing."""
    accepted, n_alive = features["label_accepted"], int(features["alive"].sum())
    n_holding = int((accepted & (features["label_score"] >= min_f1)).sum())
    return {
        "n_sites": int(features["site"].nunique()),
        "n_features": len(features),
        "n_alive": n_alive,
        "n_labelled": int(accepted.sum()),
        "labelled_share": round(int(accepted.sum()) / max(1, n_alive), 4),
        "holding_share": round(n_holding / max(1, n_alive), 4),
    }
