"""Store, dictionaries and flow graph → what the describe artifact holds.

1. prepare: vocabulary and unembedding of the model, for every process
2. survey every site (pipeline/describe/jobs.py: `survey_job`); finished sites are kept on disk
3. label every site (`label_job`); labels are inherited along the graph, so this waits for all
4. join the tables, keep the numbers of the cards

    tables/            features, labels, examples, tokens, documents, vocabulary
    sites/<short>.npz  the cards' numbers of one site (pipeline/describe/columns.py)
    about.json         model, names of sources and topics, choices

Memory: one site per process. A killed run goes on with the sites it had finished.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.model.language_model import LanguageModel
from pipeline.context import RunContext
from pipeline.describe import intermediate
from pipeline.describe.features import ABOUT, SITES
from pipeline.describe.jobs import (
    UNEMBEDDING,
    VOCABULARY,
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


def describe_sites(
    job: Job, model: LanguageModel, out: Path, context: RunContext
) -> dict[str, Any]:
    """Write tables, sites and `about.json` into `out`; returns the headline numbers."""
    prepare(job, model)
    sites = [site.short for site in saes_for(job)]
    with site_workers(context, len(sites)) as each_site:
        each_site("survey", partial(survey_job, job), sites)
        each_site("label", partial(label_job, job), sites)
    finish(job, sites, out)
    write_about(job, model, out)
    shutil.rmtree(job.work)
    return headline_of(out, job.config.min_f1)


def prepare(job: Job, model: LanguageModel) -> None:
    """Leave in the work folder what every process needs of the model."""
    job.work.mkdir(parents=True, exist_ok=True)
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


def finish(job: Job, sites: list[str], out: Path) -> None:
    """Join what the sites left."""
    (out / SITES).mkdir(parents=True, exist_ok=True)
    for short in sites:
        shutil.copyfile(intermediate.columns_path(job.work, short), out / SITES / f"{short}.npz")
    write_tables(out / "tables", [job.work / short for short in sites], corpus_for(job))


def write_about(job: Job, model: LanguageModel, out: Path) -> None:
    """Keep what the features are of."""
    corpus = corpus_for(job)
    about = {
        "model": {
            "name": model.name,
            "fingerprint": store_for(job).provenance.get("model_fingerprint", ""),
            "n_layers": model.n_layers,
            "d_model": model.d_model,
            "d_vocab": model.d_vocab,
            "n_context": store_for(job).n_context,
        },
        "sources": list(corpus.sources),
        "labels": list(corpus.labels),
    }
    (out / ABOUT).write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


def headline_of(out: Path, min_f1: float) -> dict[str, Any]:
    """How much is described and labelled; of the accepted labels, how many hold on the documents
    that chose nothing."""
    columns = ["site", "alive", "label_accepted", "label_score"]
    features = pq.read_table(out / "tables/features.parquet", columns=columns).to_pandas()
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
