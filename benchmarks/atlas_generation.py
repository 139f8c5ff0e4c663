"""How long the atlas takes to make: survey, description, labels and pages of one site, on synthetic
activations.

    python benchmarks/atlas_generation.py --tokens 131072 --latents 2048 --k 32
    python benchmarks/atlas_generation.py --latents 16384 --profile full --repeats 1     of a large
    atlas

One process, one thread; each line of JSON is one step: seconds of CPU and wall. `pages_bytes` is
the size of the site's shards per feature. Synthetic: tokens with a Zipf law, a vector a token plus
noise, a random tied TopK dictionary; real features are sparser in tokens, so tables are smaller and
labels longer there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from data.store import DocumentRow, RowFilters, TokenTable
from pipeline.describe.columns import describe_site
from pipeline.describe.corpus import Corpus, corpus_of
from pipeline.describe.encoder import Encoder
from pipeline.describe.examples import PROFILES
from pipeline.describe.labels import Acceptance, labels_of, make_rules
from pipeline.describe.projection import Unembedding, project
from pipeline.describe.rules import attribute_tables
from pipeline.describe.survey import SurveyOptions, survey_site
from pipeline.describe.vocabulary import Vocabulary
from pipeline.site.pages import write_cards
from sae import Sae
from sae.activations import TopKActivation

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 131072),
        ("latents", 2048),
        ("width", 576),
        ("k", 32),
        ("vocab", 49152),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--profile", choices=tuple(PROFILES), default="standard")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for repeat in range(options.repeats):
        run(options, repeat)


def run(options: argparse.Namespace, repeat: int) -> None:
    rng = np.random.default_rng(repeat)
    corpus = synthetic_corpus(options.tokens, options.vocab, rng)
    x = synthetic_activations(corpus, options.vocab, options.width, rng)
    sae = random_dictionary(options.latents, options.width, options.k)
    facts = {
        "repeat": repeat,
        "latents": options.latents,
        "tokens": options.tokens,
        "precision": options.precision,
        "profile": options.profile,
    }

    def timed(step: str, make: Callable[[], T], **more: object) -> T:
        wall, cpu = time.perf_counter(), time.process_time()
        made = make()
        seconds = {
            "wall_s": round(time.perf_counter() - wall, 3),
            "cpu_s": round(time.process_time() - cpu, 3),
        }
        print(json.dumps({"step": step, **facts, **seconds, **more}), flush=True)
        return made

    encoder = Encoder.of(sae, options.precision)
    profile = PROFILES[options.profile]
    survey_options = SurveyOptions(
        n_top=profile.n_top, n_near=profile.n_near, n_uniform=profile.n_reservoir
    )
    survey = timed(
        "survey", lambda: survey_site(lambda a, b: x[a:b], encoder, corpus, survey_options)
    )
    W_U = torch.from_numpy(rng.standard_normal((options.vocab, options.width)).astype(np.float32))
    unembedding = Unembedding.of(
        W_U, torch.ones(options.width), hidden=[0], precision=options.precision
    )
    projection = timed("project", lambda: project(sae.W_dec, unembedding))
    columns = timed("describe", lambda: describe_site(survey, sae, corpus, projection, profile))
    rules = timed(
        "rules",
        lambda: make_rules(attribute_tables(survey.tables(corpus), corpus), projection.promotes),
    )
    labels = timed(
        "labels",
        lambda: [
            labels_of(f, int(n), rules, None, corpus, Acceptance())
            for f, n in enumerate(columns["count"])
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        timed("cards", lambda: write_cards(Path(folder), "L0", columns, labels))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.js"))
    line = {
        "pages_bytes": round(size / options.latents, 1),
        "site_of_30_layers_mb": round(30 * size / 1e6, 1),
    }
    print(json.dumps({"step": "size", **facts, **line}), flush=True)


def synthetic_corpus(n: int, n_vocab: int, rng: np.random.Generator) -> Corpus:
    """Documents of 128 tokens with a Zipf law of tokens, two sources and eleven topics."""
    document = np.arange(n) // 128
    table = TokenTable(
        id=np.minimum(rng.zipf(1.2, n), n_vocab - 1).astype(np.uint32),
        document=document.astype(np.uint32),
        position=(np.arange(n) % 128).astype(np.uint32),
        flags=(np.arange(n) % 128 == 0).astype(np.uint8),
        documents=[
            DocumentRow(source="ab"[i % 2], label=f"topic {i % 11}")
            for i in range(int(document[-1]) + 1)
        ],
    )
    words = Vocabulary(
        tokens=[f" word{i}".encode() for i in range(n_vocab)], special=frozenset({0})
    )
    return corpus_of(table, words, filters=RowFilters(), holdout=0.33, choice=0.17, seed=0)


def synthetic_activations(
    corpus: Corpus, n_vocab: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    embedding = rng.standard_normal((n_vocab, width), dtype=np.float32)
    return embedding[corpus.token] + 0.5 * rng.standard_normal(
        (len(corpus), width), dtype=np.float32
    )


def random_dictionary(n_latents: int, width: int, k: int) -> Sae:
    W = torch.nn.functional.normalize(
        torch.randn(n_latents, width, generator=torch.Generator().manual_seed(0)), dim=1
    )
    zero = torch.zeros(width)
    return Sae(
        W_enc=W,
        b_enc=torch.zeros(n_latents),
        W_dec=W,
        b_dec=zero,
        b_in=zero,
        activation=TopKActivation(k=k),
    )


if __name__ == "__main__":
    main()
