"""How many labels hold on documents that chose nothing, by kind of rule and of site, and how sure
is that?

1. The best accepted label of every feature, and its best one about all activations, are taken from
   the describe artifact. They were proposed and chosen on other documents.
2. On the held-out documents each rule is counted again, document by document: activations, tokens
   that the rule names, and both. A label *holds* with F1 ≥ `describe.min_f1` there; the share is of
   all living features.
3. Intervals resample documents: every draw scores every rule anew.
4. The control scores on each feature the rule of another labelled feature of its site.

Acceptance on the choosing documents alone says more than holds: it is a maximum over many rules.
Cost: one encoding of the held-out third of the store per site. Source: the scores are those of
pipeline/describe/rules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from annotated_types import Ge
from jaxtyping import Bool, Float, Float32
from matplotlib.figure import Figure
from typing_extensions import Doc

from featureflow.errors import Command, UserError
from featureflow.figures import KINDS
from featureflow.sites import Site
from featureflow.statistics import Interval, bootstrap
from pipeline.describe.corpus import Corpus
from pipeline.describe.encoder import Activations, Encoder
from pipeline.describe.rules import METHOD_RULES, values_of
from pipeline.describe.survey import CHUNK_ROWS, strong_from
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.threads import side_by_side
from pipeline.run import Run
from sae.kernels.cpu import compiled

TITLE = "labels that hold on documents that chose nothing, by kind"
NEEDS = ("collect", "train", "describe")
BEST, ALL = "best label", "about all activations"
EVERY = "all"


class Config(Seeded):
    """How the intervals are made."""

    n_resamples: Annotated[int, Ge(10), Doc("bootstrap resamples of documents")] = 400


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rules of one site, a row each: in every held-out document the activations that the rule
    names (`hits`), and all activations plus the tokens that it names (`either`)."""

    site: Site
    n_alive: int
    rules: pd.DataFrame
    hits: sparse.csr_matrix
    either: sparse.csr_matrix

    def f1(
        self, chosen: Bool[np.ndarray, "rule"], weights: Float[np.ndarray, "draw document"]
    ) -> Float[np.ndarray, "chosen draw"]:
        """F1 of some of the rules, when each document counts so often."""
        return 2 * (self.hits[chosen] @ weights.T) / (self.either[chosen] @ weights.T)


def look(run: Run, config: Config) -> Finding:
    """Count rules on the held-out documents. Raises UserError when labels have no rules."""
    need = float(run.artifact("describe").config["min_f1"])
    sites = list(_scored(run, config.seed))

    def share(some: Sequence[Scores], *chosen: Any, n: int = config.n_resamples) -> Interval:
        """The share of living features with a chosen rule that holds."""

        def holding(weights: Float[np.ndarray, "draw document"]) -> Float[np.ndarray, "draw"]:
            held = [each.f1(_chosen(each.rules, *chosen), weights) >= need for each in some]
            return np.concatenate(held).sum(axis=0) / max(sum(each.n_alive for each in some), 1)

        return bootstrap(holding, sites[0].hits.shape[1], seed=config.seed, n=n)

    summary = pd.DataFrame(_summary(sites, share))
    by_site = pd.DataFrame(
        {"site": each.site.short, "layer": each.site.layer, "kind": each.site.kind} | row
        for each in sites
        for row in _rows([each], share)
    )
    top = summary[summary["sites"] == EVERY].set_index("about")
    return Finding(
        tables={"summary": summary, "kinds": pd.DataFrame(_kinds(sites, share)), "sites": by_site},
        text=_text(top, need, sites[0].hits.shape[1]),
        headline={
            "holding_share": round(float(top["holding_share"][BEST]), 4),
            "holding_share_all_activations": round(float(top["holding_share"][ALL]), 4),
            "accepted_share": round(float(top["accepted_share"][BEST]), 4),
            "control_share": round(float(top["control_share"][BEST]), 4),
        },
        figure=lambda: _draw(by_site),
        columns=_columns(sites, config),
    )


def _scored(run: Run, seed: int) -> Iterator[Scores]:
    labels = run.features.labels
    if "rule" not in labels:
        raise UserError(
            "these labels do not say which rules they are",
            where=str(run.artifact("describe").path),
            fix=Command("describe", force=True),
        )
    alive = run.features.table.groupby("site")["alive"].sum()
    accepted = labels[labels["accepted"] & labels["rule"].notna()]
    corpus, precision = run.features.corpus, run.artifact("describe").config["precision"]
    sites = run.features.sites

    def scored(site: Site) -> Scores:
        rules = _rules_of(accepted[accepted["site"] == site.short], seed)
        encoder = Encoder.of(run.saes.keeping(0)[site], precision)
        hits, either = _counted(run, site, encoder, rules, corpus)
        n_alive = int(alive[site.short])
        return Scores(site=site, n_alive=n_alive, rules=rules, hits=hits, either=either)

    found = side_by_side(run.context, scored, sites)
    for _, scores in zip(run.each("score labels", sites), found, strict=True):
        yield scores


def _rules_of(labels: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row a rule to score: `about` says as what, `other` whether it is a control."""
    ranked = labels.sort_values(["latent", "rank"])[["latent", "rule", "values"]]
    strong = ranked["rule"].str.startswith("strong_")
    parts = []
    for about, rows in ((BEST, ranked), (ALL, ranked[~strong])):
        own = rows.drop_duplicates("latent").assign(about=about, other=False)
        moved = own["latent"].to_numpy(copy=True)
        if len(moved) > 1:
            order = np.random.default_rng(seed).permutation(len(moved))
            moved[order] = np.roll(moved[order], 1)
            parts.append(own.assign(latent=moved, other=True))
        parts.append(own)
    return pd.concat(parts, ignore_index=True)


def _counted(
    run: Run, site: Site, encoder: Encoder, rules: pd.DataFrame, corpus: Corpus
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Per rule and held-out document the activations that the rule names, and all activations plus
    tokens that it names."""
    scored = corpus.held_out & corpus.kept
    documents = np.unique(corpus.document[scored])
    place = np.searchsorted(documents, corpus.document)
    hits, either = np.zeros((2, len(rules), len(documents)), np.float32)
    strong, active = _active(run, site, encoder, corpus, scored)
    for name in rules["rule"].unique():
        values, n_values = values_of(METHOD_RULES[name], corpus)
        known = scored & (values >= 0)
        tokens = sparse.csr_matrix(
            (np.ones(int(known.sum()), np.float32), (values[known], place[known])),
            shape=(n_values, len(documents)),
        )
        named = np.zeros(n_values, dtype=bool)
        for rule in np.flatnonzero(rules["rule"] == name):
            latent, chosen = int(rules["latent"][rule]), np.asarray(rules["values"][rule], np.int64)
            least = strong[latent] if name.startswith("strong_") else np.float32(0)
            named[chosen] = True
            for part in active:
                low, high = part.start[latent : latent + 2]
                row, value = part.row[low:high], part.value[low:high]
                _tally(row, value, least, values, place, named, hits[rule], either[rule])
            named[chosen] = False
            _add_rows(tokens.indptr, tokens.indices, tokens.data, chosen, either[rule])
    return sparse.csr_matrix(hits), sparse.csr_matrix(either)


@compiled()
def _tally(
    row: np.ndarray,
    value: np.ndarray,
    least: float,
    values: np.ndarray,
    place: np.ndarray,
    named: np.ndarray,
    hits: np.ndarray,
    either: np.ndarray,
) -> None:
    """Count a latent's activations of at least `least` by document, and those on named values."""
    for e in range(len(row)):
        if value[e] >= least:
            either[place[row[e]]] += 1
            v = values[row[e]]
            hits[place[row[e]]] += v >= 0 and named[v]


@compiled()
def _add_rows(
    start: np.ndarray, column: np.ndarray, data: np.ndarray, rows: np.ndarray, total: np.ndarray
) -> None:
    """Add some rows of a sparse matrix."""
    for i in rows:
        for e in range(start[i], start[i + 1]):
            total[column[e]] += data[e]


def _active(
    run: Run, site: Site, encoder: Encoder, corpus: Corpus, wanted: Bool[np.ndarray, "row"]
) -> tuple[Float32[np.ndarray, "latent"], list[Activations]]:
    """From where on each latent is strongly active, and all activations on the wanted rows."""

    def read(start: int, stop: int) -> Float32[np.ndarray, "row d_in"]:
        return run.store.read(site, start, stop)

    parts = []
    for start, stop in corpus.chunks(CHUNK_ROWS):
        rows = start + np.flatnonzero(wanted[start:stop])
        if len(rows):
            parts.append(encoder.activations(read(start, stop)[rows - start], rows)[0])
    return strong_from(read, encoder, corpus), parts


Share = Callable[..., Interval]


def _summary(sites: Sequence[Scores], share: Share) -> Iterator[dict[str, Any]]:
    """All sites, and those of each kind."""
    groups = {EVERY: list(sites)}
    for each in sites:
        groups.setdefault(KINDS[each.site.kind][0], []).append(each)
    for name, chosen in groups.items():
        yield from ({"sites": name} | row for row in _rows(chosen, share))


def _rows(sites: Sequence[Scores], share: Share) -> Iterator[dict[str, Any]]:
    """What is accepted and what holds at these sites, for either kind of label."""
    n_alive = max(sum(each.n_alive for each in sites), 1)
    for about in (BEST, ALL):
        holds, control = share(sites, about), share(sites, about, True, n=10)
        yield {
            "about": about,
            "n_alive": n_alive,
            "accepted_share": sum(int(_chosen(each.rules, about).sum()) for each in sites)
            / n_alive,
            "holding_share": holds.mean,
            "holding_share_low": holds.low,
            "holding_share_high": holds.high,
            "control_share": control.mean,
        }


def _kinds(sites: Sequence[Scores], share: Share) -> Iterator[dict[str, Any]]:
    """What holds by kind of rule, of the best labels."""
    found = {rule for each in sites for rule in each.rules["rule"]}
    for rule in (name for name in METHOD_RULES if name in found):
        n = sum(int(_chosen(each.rules, BEST, False, rule).sum()) for each in sites)
        holds = share(sites, BEST, False, rule)
        yield {
            "rule": rule,
            "n_accepted": n,
            "n_holding": round(holds.mean * sum(each.n_alive for each in sites)),
            "holding_share": holds.mean,
            "holding_share_low": holds.low,
            "holding_share_high": holds.high,
        }


def _chosen(
    rules: pd.DataFrame, about: str, other: bool = False, rule: str | None = None
) -> Bool[np.ndarray, "rule"]:
    chosen = (rules["about"] == about) & (rules["other"] == other)
    return (chosen if rule is None else chosen & (rules["rule"] == rule)).to_numpy(bool)


def _columns(sites: Sequence[Scores], config: Config) -> pd.DataFrame:
    """F1 of every feature's best label, with its interval over documents."""
    n = sites[0].hits.shape[1]
    rng = np.random.default_rng(config.seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=config.n_resamples).astype(float)
    parts = []
    for each in sites:
        own = _chosen(each.rules, BEST)
        with np.errstate(divide="ignore", invalid="ignore"):
            f1, draws = each.f1(own, np.ones((1, n)))[:, 0], each.f1(own, weights)
        low, high = np.quantile(np.nan_to_num(draws), [0.025, 0.975], axis=1)
        named = [f"{each.site.short}/{latent}" for latent in each.rules["latent"][own]]
        parts.append(
            pd.DataFrame({"feature": named, "label_f1": f1, "f1_low": low, "f1_high": high})
        )
    return pd.concat(parts, ignore_index=True)


def _text(top: pd.DataFrame, need: float, n_documents: int) -> str:
    def told(about: str) -> str:
        row = top.loc[about]
        interval = f"[{row['holding_share_low']:.1%}, {row['holding_share_high']:.1%}]"
        return f"{row['holding_share']:.1%} {interval}"

    best = top.loc[BEST]
    return (
        f"Of the living features {told(BEST)} have a label with F1 ≥ {need:g} on {n_documents} "
        f"documents that chose nothing; {told(ALL)} one about all their activations, not only the "
        f"strongest tenth. {best['accepted_share']:.1%} were accepted on the documents that chose. "
        f"With the rule of another feature of the same site {best['control_share']:.1%} hold. "
        "Intervals are 95 %, over documents; the table `kinds` splits by rule."
    )


def _draw(by_site: pd.DataFrame) -> Figure:
    named = by_site["kind"].map(lambda kind: KINDS[kind][0]) + ", " + by_site["about"]
    columns = {"holding_share": "living features whose label holds"}
    return lines(by_site.assign(line=named), x="layer", line="line", columns=columns)
