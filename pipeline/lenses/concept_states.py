"""Labelled texts at every site, read once for other lenses.

1. Definitions of fourteen WordNet topics, without their headword: split `discover` to fit on,
   `test` to report on.
2. At every stored residual site: the mean over tokens and the last token (the start token, a sink,
   is left out). At `n_sae_sites` sites with SAEs: the mean of every latent.
3. Arrays `<site>.mean`, `<site>.last`, `<site>.latents` (float16), `embedding.mean`; the table
   `texts` has topic, split and word in the same order.

Cost: one forward pass over all texts (20 tokens each). Source: the shared input of the lenses
sparse-probe, concept-depth and of others.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from typing_extensions import Doc

from data.concepts.topics import read_topics
from featureflow.sites import residual_sites
from pipeline.findings import Finding
from pipeline.lenses.base import LensConfig
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.read_out import EMBEDDING, embeddings
from pipeline.lenses.parts.texts import iter_texts
from pipeline.run import Run

TITLE = "labelled texts read once at every site, kept for other lenses"
NEEDS = ("collect", "train")
FIT, REPORT = "discover", "test"


class Config(LensConfig):
    """How many texts are read, and where latents are kept."""

    n_texts: Annotated[int, Ge(2), Doc("texts a topic and split")] = 60
    n_sae_sites: Annotated[int, Ge(1), Doc("residual sites whose latents are kept")] = 4


def look(run: Run, config: Config) -> Finding:
    """Means and last tokens of every text at every site."""
    texts = _texts(config.n_texts)
    stream = residual_sites(run.store.sites)
    coded = spread(residual_sites(run.saes), config.n_sae_sites)
    width = run.model.d_model
    arrays = {EMBEDDING + ".mean": np.zeros((len(texts), width), np.float16)}
    for site in stream:
        for kind in ("mean", "last"):
            arrays[f"{site.short}.{kind}"] = np.zeros((len(texts), width), np.float16)
    for site in coded:
        size = (len(texts), run.saes[site].n_latents)
        arrays[f"{site.short}.latents"] = np.zeros(size, np.float16)
    e, n_tokens = embeddings(run), np.zeros(len(texts), np.int64)
    with torch.no_grad():
        for places, ids, found in iter_texts(run, texts["text"].tolist(), stream):
            arrays[EMBEDDING + ".mean"][places] = e[ids[:, 1:]].mean(1).numpy()
            n_tokens[places] = ids.shape[1] - 1
            for site, x in found.items():
                arrays[f"{site.short}.mean"][places] = x[:, 1:].mean(1).numpy()
                arrays[f"{site.short}.last"][places] = x[:, -1].numpy()
                if site in coded:
                    z = run.saes[site].encode(x[:, 1:]).mean(1)
                    arrays[f"{site.short}.latents"][places] = z.numpy()
    texts["n_tokens"] = n_tokens
    counts = texts.groupby(["topic", "split"], as_index=False).agg(
        n=("text", "size"), n_tokens=("n_tokens", "sum")
    )
    return Finding(
        tables={"texts": texts, "counts": counts},
        arrays=arrays,
        text=f"{len(texts)} definitions of {texts['topic'].nunique()} topics were read at "
        f"{len(stream)} layers; latents are kept at {', '.join(s.short for s in coded)}.",
        headline={"n_texts": len(texts), "n_tokens": int(n_tokens.sum())},
    )


def _texts(n: int) -> pd.DataFrame:
    rows = []
    for topic in read_topics().values():
        for split in (FIT, REPORT):
            own = [each for each in topic.definitions if each.split == split][:n]
            rows += [
                {"topic": topic.name, "split": split, "word": each.word, "text": each.definition}
                for each in own
            ]
    return pd.DataFrame(rows)
