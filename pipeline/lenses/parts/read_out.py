"""What rows of the residual stream say in words: rows and embeddings, maps to the last layer, the
model's read-out, and the tokens that directions promote.

`promoted` gives the ten tokens of the corpus that a direction raises most, u(d) = W_U (gain · d)
without its mean over the vocabulary. `followed` tests them: does one of the ten come more often
where a feature is active than elsewhere (binomial, Benjamini and Hochberg within the site)?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.model.partial_forward import continued_from
from data.tokens import FLAG_BOS, FLAG_PADDING, FLAG_SPECIAL
from featureflow.errors import UserError
from featureflow.sites import Site, residual_sites
from featureflow.statistics import q_values
from pipeline.lenses.parts.held_out import iter_rows
from pipeline.run import Run

EMBEDDING = "embedding"
N_TOKENS = 10
FEW = 20
"""A feature is tested when it is active on at least so many rows."""
_ROWS = 256
Blocks = list[Int[np.ndarray, "row"]]


def rows_at(run: Run, site: Site | None, blocks: Blocks) -> Float[Tensor, "row d_model"]:
    """The rows of a site; the embeddings of their tokens for no site."""
    return torch.cat([*iter_at(run, site, blocks)])


def iter_at(run: Run, site: Site | None, blocks: Blocks) -> Iterator[Float[Tensor, "row d_model"]]:
    """The same, block by block."""
    if site is not None:
        yield from (x for x, _ in iter_rows(run.store, site, blocks))
        return
    weight, ids = embeddings(run), run.tokens.id
    yield from (weight[torch.from_numpy(ids[rows].astype(np.int64))] for rows in blocks)


def embeddings(run: Run) -> Float[Tensor, "vocab d_model"]:
    """The token embeddings, in float32."""
    table: Any = run.model.hf.get_input_embeddings()
    return table.weight.detach().float().cpu()


def document_of(run: Run, blocks: Blocks) -> Int[np.ndarray, "row"]:
    """The document of every row."""
    return run.tokens.document[np.concatenate(blocks)].astype(np.int64)


def later(run: Run, rows: Int[np.ndarray, "row"], n: int) -> Int[np.ndarray, "row"]:
    """The row `n` tokens after (before, for n < 0) each row, in the same context and document, on
    an ordinary token; -1 where there is none."""
    tokens = run.tokens
    place = np.clip(rows + n, 0, len(tokens) - 1)
    inside = tokens.position[place].astype(np.int64) == tokens.position[rows].astype(np.int64) + n
    same = tokens.document[place] == tokens.document[rows]
    ordinary = (tokens.flags[place] & (FLAG_BOS | FLAG_SPECIAL | FLAG_PADDING)) == 0
    return np.where(inside & same & ordinary, place, -1)


def carried(
    x: Float[Tensor, "row d_model"], maps: Mapping[str, np.ndarray], name: str
) -> Float[Tensor, "row d_model"]:
    """Rows carried to the last layer by the map of `translators` for the site `name`."""
    return x @ torch.from_numpy(maps[name]) + torch.from_numpy(maps[f"{name}.offset"])


def whole_stream(run: Run) -> list[Site]:
    """The stored sites of the residual stream. Raises UserError when the last layer is not one."""
    sites, last = residual_sites(run.store.sites), run.model.n_layers - 1
    if sites[-1].layer != last:
        raise UserError(
            "the last layer is not stored, so there is nothing to compare with",
            where=run.store.url,
            expected=f"L{last}",
            found=sites[-1].short,
            fix=f"add resid_post:{last} to collect.sites",
        )
    return sites


@torch.no_grad()
def iter_log_p(run: Run, x: Float[Tensor, "row d_model"]) -> Iterator[Float[Tensor, "row vocab"]]:
    """The model's log-probabilities when its last layer leaves these rows, 256 rows a time."""
    last = run.model.n_layers - 1
    for part in x.split(_ROWS):
        with continued_from(run.model, last, part[:, None]):
            logits = run.model.logits(torch.zeros(len(part), 1, dtype=torch.int64))
        yield logits[:, 0].float().log_softmax(-1).cpu()


def first_tokens(run: Run, x: Float[Tensor, "row d_model"]) -> Int[np.ndarray, "row"]:
    """The likeliest token of every row's read-out."""
    return torch.cat([log_p.argmax(-1) for log_p in iter_log_p(run, x)]).numpy()


def ranked(
    run: Run, x: Float[Tensor, "row d_model"], *targets: Int[Tensor, "row"]
) -> tuple[Any, ...]:
    """The first token of every row's read-out; then for each of `targets` the rank (1 is first) and
    the log-probability of every row's token."""
    top: list[Tensor] = []
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in targets]
    for log_p, *own in zip(iter_log_p(run, x), *(t.split(_ROWS) for t in targets), strict=True):
        top.append(log_p.argmax(1))
        for (rank, value), ids in zip(found, own, strict=True):
            value.append(log_p.gather(1, ids[:, None]))
            rank.append((log_p > value[-1]).sum(1) + 1)
    joined = [tuple(torch.cat(each).flatten().numpy() for each in pair) for pair in found]
    return torch.cat(top).numpy(), *joined


class Vocabulary:
    """The tokens of the corpus as directions, and which of them a direction promotes most."""

    def __init__(self, run: Run) -> None:
        self._run = run
        W_U, gain = run.model.unembedding()
        u = W_U.float().cpu() * gain.float().cpu()
        self.seen = np.unique(run.tokens.id[: run.store.n_rows].astype(np.int64))
        self._u = (u - u.mean(0))[torch.from_numpy(self.seen)]

    def promoted(
        self, d: Float[Tensor, "latent d_model"], n: int = N_TOKENS
    ) -> Int[np.ndarray, "latent ten"]:
        """The tokens that every row of `d` promotes most."""
        n = min(n, len(self.seen))
        best = [self.scores(part).topk(n).indices for part in d.split(_ROWS)]
        return self.seen[torch.cat(best).numpy()]

    def scores(self, d: Float[Tensor, "latent d_model"]) -> Float[Tensor, "latent seen"]:
        """u(d) of every token that the corpus has, in the order of `seen`."""
        return d.float() @ self._u.T

    def words(self, tokens: Int[np.ndarray, "latent ten"]) -> list[str]:
        """The texts of each row's tokens, in one line."""
        return [" ".join(self._texts[int(token)] for token in row) for row in tokens]

    @cached_property
    def _texts(self) -> dict[int, str]:
        text = self._run.model.tokenizer.token_text
        return {int(token): text(int(token)).strip() for token in self.seen}


@lru_cache(maxsize=1)
def vocabulary_of(run: Run) -> Vocabulary:
    """The run's vocabulary, made once."""
    return Vocabulary(run)


def followed(
    ten: Int[np.ndarray, "latent ten"],
    active: Bool[np.ndarray, "row latent"],
    comes_id: Int[np.ndarray, "row"],
    *,
    name: str,
) -> pd.DataFrame:
    """Per feature: how much more often one of its ten comes where it is active than on any row
    (lift), and q of the binomial test among the features that are active often enough."""
    lift, p = np.full(len(ten), np.nan), np.full(len(ten), np.nan)
    for latent in np.flatnonzero(active.sum(0) >= FEW):
        comes = np.isin(comes_id, ten[latent])
        here, base = comes[active[:, latent]], comes.mean()
        lift[latent] = here.mean() / base if base else np.nan
        p[latent] = scipy.stats.binom.sf(here.sum() - 1, len(here), base) if base else 1.0
    tested = np.isfinite(p)
    q = np.full(len(ten), np.nan)
    q[tested] = q_values(p[tested]) if tested.any() else q[tested]
    return pd.DataFrame({f"{name}_lift": lift, f"{name}_q": q})
