"""Which linear map carries the residual stream after a layer to what it is in the end?

1. From every stored site of the residual stream, and from the token's embedding, an affine map to
   the last stored one is fitted by ridge regression: h_last ≈ h A + b. Rows of the train split
   count, without BOS, special and sink rows; the penalty is 1e-4 of the mean variance.
2. r² on rows of held-out documents, pooled over coordinates, with an interval over documents;
   beside it r² of the vector as it is (the logit lens), and of a map fitted on rows paired at
   random.
3. The maps are kept as arrays `<site>` (A, of shape d_model × d_model) and `<site>.offset` (b), for
   other lenses. `embedding` is the baseline that knows the token alone.

Cost: one d×d product of `n_tokens` rows per site and map. Source: Yom Din et al. 2023, Jump to
Conclusions (arXiv 2303.09435), who fit without b; its text was not read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import Site, residual_sites
from featureflow.statistics import bootstrap_ratio, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.read_out import EMBEDDING, document_of, iter_at
from pipeline.run import Run

TITLE = "linear maps from every layer to the last (Jump to Conclusions), kept for other lenses"
NEEDS = ("collect",)
RIDGE = 1e-4
Batches = Callable[[], Iterator[Float[Tensor, "token d_model"]]]


class Config(Sampled):
    """On how much text maps are fitted and judged."""

    n_tokens: Annotated[int, Ge(2), Doc("train tokens that the maps are fitted on")] = 65536
    n_held_out: Annotated[int, Ge(2), Doc("held-out tokens that they are judged on")] = 8192


def look(run: Run, config: Config) -> Finding:
    """A map and its r² for every layer. Raises UserError when fewer than two layers are stored."""
    sites = residual_sites(run.store.sites)
    if len(sites) < 2:
        raise UserError(
            "a map between layers needs two of them",
            where=run.store.url,
            expected="two or more resid_post sites",
            fix="set collect.sites to resid_post",
        )
    last = sites[-1]
    train = choose_rows(run, config, config.n_tokens, split="train")
    held_out = choose_rows(run, config, config.n_held_out)
    document = document_of(run, held_out)
    target, judged = partial(iter_at, run, last, train), partial(iter_at, run, last, held_out)
    maps: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    for site in run.each(f"carry to {last.short} from", [None, *sites[:-1]]):
        name = EMBEDDING if site is None else site.short
        x, y = (partial(iter_at, run, site, part) for part in (train, held_out))
        rng = np.random.default_rng(config.seed)
        shuffled = partial(_shuffled, target, rng)
        fitted, at_random = fit(x, target, shuffled)
        nothing = (torch.eye(len(fitted[0])), torch.zeros(len(fitted[1])))
        where = {"site": None, "layer": -1} if site is None else {"site": name, "layer": site.layer}
        row: dict[str, Any] = {"from": name, **where}
        for column, each in (("r2", fitted), ("as_is", nothing), ("null", at_random)):
            row |= _judged(column, each, y, judged, document, config.seed)
        rows.append(row)
        maps |= {name: fitted[0].float().numpy(), f"{name}.offset": fitted[1].float().numpy()}
    table = pd.DataFrame(rows)
    middle = table.iloc[len(table) // 2]
    return Finding(
        tables={"maps": table},
        arrays=maps,
        figure=lambda: lines(
            table.melt(["layer"], ["r2", "as_is", "null"], "vector", "value").assign(
                vector=lambda long: long["vector"].map(
                    {"r2": "carried", "as_is": "as it is", "null": "paired at random"}
                ),
                value=lambda long: long["value"].clip(-1),
            ),
            x="layer",
            line="vector",
            columns={"value": f"r² of {last.short}, held-out tokens (−1: the embedding)"},
        ),
        text=_text(table, last),
        headline={"r2 from the embedding": round(float(table["r2"].iloc[0]), 4)}
        | {f"r2 from {middle['from']}": round(float(middle["r2"]), 4)},
    )


def fit(x: Batches, *ys: Batches) -> list[tuple[Float[Tensor, "d_in d_out"], Tensor]]:
    """The affine maps (A, b) from rows of `x` to rows of each of `ys`: one pass, one covariance.
    Products in float32 of rows less the first batch's mean, sums in float64."""
    n, start, sums = 0, None, None
    for batch, *others in zip(x(), *(y() for y in ys), strict=True):
        parts = [each.float() for each in (batch, *others)]
        start = start or [each.mean(0) for each in parts]
        a, *bs = (each - mean for each, mean in zip(parts, start, strict=True))
        here = [a.sum(0), a.T @ a, *(b.sum(0) for b in bs), *(a.T @ b for b in bs)]
        wide = [each.double() for each in here]
        sums = wide if sums is None else [s + w for s, w in zip(sums, wide, strict=True)]
        n += len(batch)
    assert start is not None
    assert sums is not None
    mean_x = sums[0] / n
    covariance = sums[1] / n - torch.outer(mean_x, mean_x)
    penalty = RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(covariance + penalty * torch.eye(len(covariance)))
    maps = []
    for i in range(len(ys)):
        mean_y = sums[2 + i] / n
        cross = sums[2 + len(ys) + i] / n - torch.outer(mean_x, mean_y)
        A = torch.cholesky_solve(cross, factor)
        offset = mean_y + start[1 + i] - (mean_x + start[0]).double() @ A
        maps.append((A, offset))
    return maps


def _shuffled(y: Batches, rng: np.random.Generator) -> Iterator[Float[Tensor, "token d_model"]]:
    """Rows in another order within each batch."""
    return (h[rng.permutation(len(h))] for h in y())


def _judged(
    column: str,
    fitted: tuple[Tensor, Tensor],
    x: Batches,
    y: Batches,
    document: Int[np.ndarray, "token"],
    seed: int,
) -> dict[str, float]:
    """r² over all coordinates of held-out rows, with its interval over documents."""
    A, offset = (part.double() for part in fitted)
    left, right = (torch.cat([*rows()]).double() for rows in (x, y))
    error = (left @ A + offset - right).square().sum(1).numpy()
    total = (right - right.mean(0)).square().sum(1).numpy()
    _, unit = np.unique(document, return_inverse=True)
    share = bootstrap_ratio(np.bincount(unit, error), np.bincount(unit, total), seed=seed)
    low, high = 1 - share.high, 1 - share.low
    return {column: 1 - share.mean, f"{column}_low": low, f"{column}_high": high}


def _text(table: pd.DataFrame, last: Site) -> str:
    said = [
        f"  from {row['from']}: {ranged(row, 'r2')}, as it "
        f"is {row['as_is']:.2f}, paired at random {row['null']:.2f}"
        for row in table.to_dict("records")
    ]
    return (
        "What the paper saw (abstract only; its text was not read here): a linear map predicts the "
        "last layer better than\n"
        "the vector itself, at every layer.\n\n"
        f"What this model shows, r² of {last.short} on held-out documents, 95 % intervals:\n"
        + "\n".join(said)
        + "\nA map says what usually goes with a vector, not what the vector causes. The line "
        "'from embedding' is what\nthe token alone predicts."
    )
