"""What of the past is still in a vector, what of the future already; and which features announce a
token one to four tokens ahead?

1. Future: an affine map from h at token t to the last layer at t + N, N = 0 … 3, fitted on train
   rows. Precision@1 of its read-out against the model's own likeliest token there, on held-out
   rows. Baselines: the same map from the token's embedding, and the commonest token after this one
   at that distance (bigram with a gap).
2. Past: a map from h to the embedding of the token N before; right when that token is the nearest
   by cosine among the tokens of the corpus. Baseline: the same map from the embedding.
3. Features: the ten tokens that a feature's row promotes when it is carried to t + N
   (`<site>`, N). Does one of them come at t + N + 1 more often where the feature is active than on
   any row? Binomial test, Benjamini and Hochberg within a site; null: the ten of another feature.

Cost: five products of `n_tokens` rows a site, and read-outs of `n_rows` rows a map. Source: Pal et
al. 2023, Future Lens (arXiv 2311.04897): over 48 % of GPT-J's next-but-one predictions from one
hidden state, by a learned prompt; linear maps are weaker (abstract only read here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import Site
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.read_out import (
    EMBEDDING,
    Blocks,
    document_of,
    embeddings,
    first_tokens,
    followed,
    iter_at,
    later,
    rows_at,
    vocabulary_of,
    whole_stream,
)
from pipeline.lenses.translators import fit
from pipeline.run import Run

TITLE = "what a vector keeps of the past and knows of the future; tokens that features announce"
NEEDS = ("collect", "train")
_BLOCK = 2048
Map = tuple[Tensor, Tensor]


class Config(Sampled):
    """How far is looked, and on how much text."""

    n_tokens: Annotated[int, Ge(64), Doc("train tokens that maps are fitted on")] = 32768
    n_rows: Annotated[int, Ge(8), Doc("held-out rows that maps are judged on")] = 1000
    n_tested: Annotated[int, Ge(8), Doc("held-out rows on which features are tested")] = 8192
    n_layers: Annotated[int, Ge(1), Doc("layers of the figure, spread over the depth")] = 6
    n_sites: Annotated[
        int | None, Ge(1), Doc("residual sites whose features are tested; none for all")
    ] = None
    offsets: Annotated[tuple[int, ...], Doc("steps N beyond the next token")] = (0, 1, 2, 3)
    back: Annotated[tuple[int, ...], Doc("how many tokens back")] = (0, 1, 2, 4)
    rate: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate of announcing features")] = 0.05


def look(run: Run, config: Config) -> Finding:
    """Precision by layer and distance, and the tokens that features announce. Raises UserError
    when the last layer is not stored."""
    sites = whole_stream(run)
    shown = set(spread(sites, config.n_layers))
    tested = [site for site in sites[:-1] if site in run.saes]
    tested = spread(tested, config.n_sites or len(tested))
    rows = [*_counts(run, sites[-1], config)]
    future = Targets.of(run, sites[-1], config.offsets, config)
    past = Targets.of(run, None, tuple(-n for n in config.back), config)
    announced: list[pd.DataFrame] = []
    wanted = [None, *sorted({*shown, *tested})]
    for site in run.each("look ahead from", wanted):
        maps = future.maps(run, site)
        if site is None or site in shown:
            rows += _future(run, site, sites[-1], maps, config)
            rows += _past(run, site, past.maps(run, site), config)
        if site in tested and site is not None:
            announced.append(announcing(run, site, maps, config))
    table = pd.DataFrame(rows)
    features = pd.concat(announced, ignore_index=True) if announced else pd.DataFrame()
    counts = _counted(features, config.rate)
    return Finding(
        tables={"layers": table, "announcing": counts, "features": features},
        figure=lambda: lines(
            table[table["what"] != "past"].assign(
                line=lambda t: (
                    t["from"].map(lambda x: x if x in (EMBEDDING, "bigram") else "")
                    + t["site"].fillna("")
                )
            ),
            x="n",
            line="line",
            columns={"precision": "precision@1 against the model's own token at t+N"},
            x_label="N tokens ahead",
        ),
        text=_text(table, counts),
        headline={
            f"n_announcing_{way}": int(counts[f"n_{way}"].sum()) for way in ("own", "permuted")
        }
        if len(counts)
        else {"n_announcing_own": 0, "n_announcing_permuted": 0},
        columns=_columns(features, config.rate),
    )


def _pairs(run: Run, blocks: Blocks, *steps: int) -> tuple[Blocks, list[Blocks]]:
    """Blocks of rows, and for every step the blocks of rows so many tokens later; rows that lack
    one are left out."""
    here: Blocks = []
    there: list[Blocks] = [[] for _ in steps]
    for rows in blocks:
        to = np.stack([later(run, rows, n) for n in steps])
        known = (to >= 0).all(0)
        if known.any():
            here.append(rows[known])
            for blocks_there, each in zip(there, to, strict=True):
                blocks_there.append(each[known])
    return here, there


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """Rows and, for every step, what lies so many tokens from them: fitted to from every site."""

    here: Blocks
    steps: tuple[int, ...]
    values: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, run: Run, site: Site | None, steps: tuple[int, ...], config: Config) -> Targets:
        rows = choose_rows(run, config, config.n_tokens, split="train")
        here, there = _pairs(run, rows, *steps)
        values = tuple(tuple(iter_at(run, site, blocks)) for blocks in there)
        return cls(here=here, steps=steps, values=values)

    def maps(self, run: Run, site: Site | None) -> dict[int, Map]:
        """For every step the map from rows of a site."""
        ys = [partial(iter, each) for each in self.values]
        return dict(zip(self.steps, fit(partial(iter_at, run, site, self.here), *ys), strict=True))


def _judging(run: Run, n: int, config: Config) -> tuple[Blocks, Blocks]:
    blocks = choose_rows(run, config, config.n_rows)
    here, [there] = _pairs(run, blocks, n)
    return here, there


def _future(
    run: Run, site: Site | None, last: Site, maps: dict[int, Map], config: Config
) -> Iterator[dict[str, Any]]:
    for n, (A, b) in maps.items():
        here, there = _judging(run, n, config)
        guess = first_tokens(run, (rows_at(run, site, here).double() @ A + b).float())
        truth = first_tokens(run, rows_at(run, last, there))
        yield _row("future", site, n, guess == truth, document_of(run, here), config)


def _past(
    run: Run, site: Site | None, maps: dict[int, Map], config: Config
) -> Iterator[dict[str, Any]]:
    seen = np.unique(run.tokens.id[: run.store.n_rows].astype(np.int64))
    unit = torch.nn.functional.normalize(embeddings(run)[torch.from_numpy(seen)], dim=-1)
    for n, (A, b) in maps.items():
        here, there = _judging(run, n, config)
        guess = (rows_at(run, site, here).double() @ A + b).float()
        nearest = torch.cat([(part @ unit.T).argmax(-1) for part in guess.split(_BLOCK)])
        right = seen[nearest.numpy()] == run.tokens.id[np.concatenate(there)]
        yield _row("past", site, n, right, document_of(run, here), config)


def _counts(run: Run, last: Site, config: Config) -> Iterator[dict[str, Any]]:
    """What counting pairs of tokens with a gap gets right."""
    train = choose_rows(run, config, run.store.n_rows, split="train")
    for n in config.offsets:
        here, [there] = _pairs(run, train, n + 1)
        ids = run.tokens.id
        best = commonest(ids[np.concatenate(here)], ids[np.concatenate(there)])
        here, there = _judging(run, n, config)
        truth = first_tokens(run, rows_at(run, last, there))
        guess = np.array([best.get(int(x), -1) for x in ids[np.concatenate(here)]])
        row = _row("future", None, n, guess == truth, document_of(run, here), config)
        yield row | {"from": "bigram"}


def commonest(before: Int[np.ndarray, "pair"], after: Int[np.ndarray, "pair"]) -> dict[int, int]:
    """Per token the one that follows it most often; of equals the smaller id."""
    pairs, n = np.unique(np.stack([before, after], 1).astype(np.int64), axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -n, pairs[:, 0]))
    first = np.unique(pairs[order, 0], return_index=True)[1]
    return {int(a): int(b) for a, b in pairs[order][first]}


def _row(
    what: str,
    site: Site | None,
    n: int,
    right: np.ndarray,
    document: Int[np.ndarray, "row"],
    config: Config,
) -> dict[str, Any]:
    name = EMBEDDING if site is None else site.short
    row = {"what": what, "from": name, "site": None if site is None else site.short, "n": n}
    found = mean_over(right.astype(float), document, seed=config.seed)
    return row | named("precision", found) | {"n_rows": len(right)}


def announcing(run: Run, site: Site, maps: dict[int, Map], config: Config) -> pd.DataFrame:
    """Per feature and N: its ten tokens, how much more often one comes at t + N + 1, and q; and
    the same with another feature's tokens."""
    sae, vocabulary = run.saes[site], vocabulary_of(run)
    blocks = choose_rows(run, config, config.n_tested)
    active = torch.cat([sae.encode(x) > 0 for x in iter_at(run, site, blocks)]).numpy()
    d: Float[Tensor, "latent d_model"] = sae.W_dec.detach().float().cpu()
    order = np.random.default_rng(config.seed).permutation(len(d))
    rows = np.concatenate(blocks)
    frames = []
    for n, (A, _) in maps.items():
        ten = vocabulary.promoted(d @ A.float())
        there = later(run, rows, n + 1)
        known, ids = there >= 0, run.tokens.id[there].astype(np.int64)
        own = followed(ten, active[known], ids[known], name="own")
        null = followed(ten[order], active[known], ids[known], name="permuted")
        frames.append(
            pd.DataFrame({"feature": [f"{site.short}/{i}" for i in range(len(d))], "at": n + 1})
            .join(own)
            .join(null)
            .assign(tokens=vocabulary.words(ten))
        )
    return pd.concat(frames, ignore_index=True).dropna(subset=["own_q"])


def _counted(features: pd.DataFrame, rate: float) -> pd.DataFrame:
    if not len(features):
        return pd.DataFrame(columns=["site", "at", "n_tested", "n_own", "n_permuted", "lift"])
    site = features["feature"].str.rpartition("/")[0]
    rows = [
        {
            "site": name,
            "at": at,
            "n_tested": len(part),
            "n_own": int((part["own_q"] <= rate).sum()),
            "n_permuted": int((part["permuted_q"] <= rate).sum()),
            "lift": part["own_lift"].median(),
        }
        for (name, at), part in features.groupby([site, "at"], sort=False)
    ]
    return pd.DataFrame(rows)


def _columns(features: pd.DataFrame, rate: float) -> pd.DataFrame | None:
    """On cards: beyond the next token, the step with the largest lift among those accepted."""
    if not len(features):
        return None
    found = features[(features["own_q"] <= rate) & (features["at"] > 1)]
    best = found.sort_values("own_lift", ascending=False).drop_duplicates("feature")
    text = "t+" + best["at"].astype(str) + ": " + best["tokens"]
    lift = best["own_lift"].round(1)
    return pd.DataFrame({"feature": best["feature"], "announces": text, "announces_lift": lift})


def _text(table: pd.DataFrame, counts: pd.DataFrame) -> str:
    said = [
        f"  {row['what']}, from {row['from']}, N = {row['n']}: {ranged(row, 'precision')}"
        for row in table.to_dict("records")
    ]
    found = [
        f"  {row.site}, t+{row.at}: {row.n_own} of {row.n_tested} announce, median lift "
        f"{row.lift:.1f} (another feature's tokens: {row.n_permuted})"
        for row in counts.itertuples()
    ]
    return (
        "What the paper saw (abstract only): more than 48 % of GPT-J's next-but-one predictions "
        "from one hidden state, by a\nlearned prompt; middle layers best.\n\n"
        "What this model shows (linear maps, held-out documents, 95 % intervals):\n"
        + "\n".join(said)
        + "\nFeatures that announce tokens:\n"
        + "\n".join(found or ["  none were tested"])
    )
