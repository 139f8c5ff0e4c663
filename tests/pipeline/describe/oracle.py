"""A corpus and a dictionary small enough to describe by loops, and those loops: the oracle for the
one-pass survey."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from data.store import FLAG_BOS, DocumentRow, RowFilters, TokenTable
from pipeline.describe.corpus import Corpus, corpus_of
from pipeline.describe.vocabulary import Vocabulary
from sae import Sae
from sae.activations import Activation, Threshold, TopKActivation

N_TOKENS, D, N_LATENTS = 40, 12, 24


def small_corpus(seed: int = 0, *, n_documents: int = 30, length: int = 20) -> Corpus:
    """Documents of one context each, BOS first; some documents repeat others word for word."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(1, N_TOKENS, size=(n_documents, length))
    documents[n_documents // 2 :: 3] = documents[: len(documents[n_documents // 2 :: 3])]
    documents[:, 0] = 0
    words = ["<|endoftext|>", *(f" word{i}" for i in range(1, N_TOKENS))]
    table = TokenTable(
        id=documents.ravel().astype(np.uint32),
        document=np.repeat(np.arange(n_documents), length).astype(np.uint32),
        position=np.tile(np.arange(length), n_documents).astype(np.uint32),
        flags=np.where(documents.ravel() == 0, FLAG_BOS, 0).astype(np.uint8),
        documents=[
            DocumentRow(
                source="ab"[i % 2], title=f"document {i}", label=["", "north", "south"][i % 3]
            )
            for i in range(n_documents)
        ],
    )
    vocabulary = Vocabulary(tokens=[w.encode() for w in words], special=frozenset({0}))
    return corpus_of(table, vocabulary, filters=RowFilters(), holdout=0.3, choice=0.2, seed=0)


def small_dictionary(seed: int = 0, activation: Activation | None = None) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N_LATENTS, D, generator=generator), dim=1)
    zero = torch.zeros(D)
    b_enc = torch.zeros(N_LATENTS)
    b_enc[-1] = -1e6  # a dead latent
    return Sae(
        W_enc=W,
        b_enc=b_enc,
        W_dec=W,
        b_dec=zero,
        b_in=zero,
        activation=activation or TopKActivation(k=4),
    )


def threshold_dictionary(seed: int = 0) -> Sae:
    return small_dictionary(seed, Threshold(theta=torch.full((N_LATENTS,), 0.8)))


def small_activations(corpus: Corpus, seed: int = 0) -> np.ndarray:
    """A vector a token plus noise, so that latents prefer some tokens."""
    rng = np.random.default_rng(seed + 1)
    embedding = rng.standard_normal((N_TOKENS, D))
    x = embedding[corpus.token] + 0.3 * rng.standard_normal((len(corpus), D))
    return x.astype(np.float32)


@dataclass
class Slow:
    """What a loop over every activation finds."""

    z: np.ndarray
    pre: np.ndarray
    count: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    values: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    pairs: dict[tuple[str, int, int], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0] * 5)
    )


def slow_survey(x: np.ndarray, sae: Sae, corpus: Corpus) -> Slow:
    """Loop over rows and latents; dense, obvious, slow."""
    pre = sae.pre_activations(torch.from_numpy(x))
    z = sae.activation(pre).numpy()
    slow = Slow(z=z, pre=pre.numpy())
    for row in range(len(corpus)):
        if not corpus.kept[row]:
            continue
        for latent in range(sae.n_latents):
            a = float(z[row, latent])
            if a == 0:
                continue
            slow.count[latent] += 1
            slow.values[latent].append((a, row))
            for attribute in ("token", "previous", "next", "position", "source", "topic"):
                value = int(corpus.attribute(attribute)[row])
                if value >= 0:
                    pair = slow.pairs[attribute, latent, value]
                    pair[int(corpus.part[row])] += 1
                    pair[3 + int(corpus.held_out[row])] += a
    return slow


def slow_top(slow: Slow, corpus: Corpus, latent: int, size: int) -> list[int]:
    """Rows of the strongest activations: the strongest of each document, then one per surrounding
    text."""
    best: dict[int, tuple[float, int]] = {}
    for a, row in slow.values[latent]:
        document = int(corpus.document[row])
        if document not in best or (-a, row) < (-best[document][0], best[document][1]):
            best[document] = (a, row)
    rows, seen = [], set()
    for _a, row in sorted(best.values(), key=lambda pair: (-pair[0], pair[1])):
        text = surrounding(corpus, row)
        if text not in seen:
            seen.add(text)
            rows.append(row)
    return rows[:size]


def surrounding(corpus: Corpus, row: int, reach: int = 8) -> tuple[int, ...]:
    """The tokens within `reach` of a row that are in the same run; −1 elsewhere."""
    return tuple(
        int(corpus.token[r]) if 0 <= r < len(corpus) and corpus.run[r] == corpus.run[row] else -1
        for r in range(row - reach, row + reach + 1)
    )
