"""Rule labels: "active where the attribute of the token is one of these values", proposed, chosen
and scored on different documents.

Rules are about all activations of a latent, or about its strong ones (the strongest tenth), which
say more of a feature that is active weakly on many things.

Proposal, for every latent at once, from the counts of the documents for proposing:

1. sort an attribute's values by how often the latent is active given the value;
2. the set with the best F1 is a beginning of that list (a value helps while its precision exceeds
   half the best F1), so one cumulative sum finds it; sets are cut at `ATTRIBUTE_RULES[…].most`
   values, since a long list is no rule.

Choice: F1 on documents of their own says which rule is taken, so that the score is not the best of
several.

Score, from the counts of the held-out documents, with TP = activations on the set, n = activations,
m = tokens on the set:

    precision TP/m,   recall TP/n,   F1 = 2J/(1+J) with J = TP/(n + m − TP)

J is a share of independent-looking events (token is active or matches), so Wilson's interval of J,
mapped through the same increasing function, is the interval of F1. Near-misses add `near_miss`: the
share of them the rule rejects. Tokens of one document are not independent: read the interval as the
narrowest that is defensible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from pipeline.describe.corpus import CHOOSING, HELD_OUT, PROPOSING, Corpus
from pipeline.describe.counts import CHOOSE, HELD, MASS, NEGATIVE, PROPOSE, Counts, Target
from pipeline.describe.vocabulary import CLASSES, Vocabulary


@dataclass(frozen=True)
class AttributeRule:
    """A kind of rule: the table it is read from, how many values a rule may name, and how it
    reads."""

    name: str
    table: str
    most: int
    about: str


ATTRIBUTE_RULES: tuple[AttributeRule, ...] = (
    AttributeRule("token", "token", 12, "active on these tokens"),
    AttributeRule("family", "token", 8, "active on forms of these words"),
    AttributeRule("class", "token", 2, "active on tokens of these characters"),
    AttributeRule("previous", "previous", 12, "active after these tokens"),
    AttributeRule("next", "next", 12, "active before these tokens"),
    AttributeRule("position", "position", 3, "active at these positions of the context"),
    AttributeRule("source", "source", 2, "active in text from these sources"),
    AttributeRule("topic", "topic", 2, "active in documents about these topics"),
)
TARGETS: tuple[Target, ...] = ("all", "strong")
_Z = 1.959963984540054


def method_name(rule: str, target: Target) -> str:
    """`token`, or `strong_token` for a rule about strong activations."""
    return rule if target == "all" else f"strong_{rule}"


METHOD_RULES = {method_name(r.name, target): r for target in TARGETS for r in ATTRIBUTE_RULES}
"""The methods that make rules, in the order of preference within each target."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RuleSets:
    """One rule per latent: the values of latent f are `value[start[f]:start[f+1]]`, best first
    (none: no proposal). `f1` is the F1 on the documents it was proposed on; it serves to choose
    among rules, never as a score."""

    attribute: str
    target: Target
    start: Int64[np.ndarray, "latent_and_one"]
    value: Int64[np.ndarray, "member"]
    f1: Float64[np.ndarray, "latent"]

    def of(self, latent: int) -> Int64[np.ndarray, "member"]:
        return self.value[self.start[latent] : self.start[latent + 1]]

    def taken_from(self, parents: Int64[np.ndarray, "latent"]) -> RuleSets:
        """The rules of other latents: entry f is the rule of `parents[f]`, none where that is
        negative."""
        lengths = np.where(parents >= 0, np.diff(self.start)[np.maximum(parents, 0)], 0)
        start = np.concatenate([[0], lengths.cumsum()])
        owner = np.repeat(np.arange(len(parents)), lengths)
        member = np.arange(len(owner)) - start[owner] + self.start[parents[owner]]
        f1 = np.where(parents >= 0, self.f1[np.maximum(parents, 0)], 0.0)
        return RuleSets(
            attribute=self.attribute,
            target=self.target,
            start=start,
            value=self.value[member],
            f1=f1,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RuleScores:
    """Held-out scores per latent, and `choice`, the F1 on the documents that decide which rule is
    taken. NaN where nothing could be measured (the latent was never active there)."""

    f1: Float64[np.ndarray, "latent"]
    low: Float64[np.ndarray, "latent"]
    high: Float64[np.ndarray, "latent"]
    precision: Float64[np.ndarray, "latent"]
    recall: Float64[np.ndarray, "latent"]
    mass_recall: Float64[np.ndarray, "latent"]
    near_miss: Float64[np.ndarray, "latent"]
    n: Int64[np.ndarray, "latent"]
    choice: Float64[np.ndarray, "latent"]
    n_choice: Int64[np.ndarray, "latent"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributeTable:
    """Counts of one attribute about one target, the totals of the corpus per value, and the totals
    of each latent over all rows (also those where the attribute has no value): what proposing and
    scoring need."""

    rule: AttributeRule
    counts: Counts
    target: Target
    seen: Int64[np.ndarray, "part value"]
    totals: Float64[np.ndarray, "latent five"]


def attribute_tables(tables: Mapping[str, Counts], corpus: Corpus) -> dict[str, AttributeTable]:
    """One table for every method of METHOD_RULES; families and classes are groupings of the token
    table."""
    out: dict[str, AttributeTable] = {}
    whole = tables[
        "position"
    ]  # every row has a position and there are few, so this table is never pruned
    totals = {target: whole.about(target).totals() for target in TARGETS}
    for rule in ATTRIBUTE_RULES:
        counts = tables[rule.table]
        seen = corpus.totals(rule.table)
        if rule.name in ("family", "class"):
            value_of, n = _grouping(rule.name, corpus.vocabulary)
            counts = counts.mapped(value_of, n)
            seen = np.stack(
                [np.bincount(value_of, weights=part, minlength=n).astype(np.int64) for part in seen]
            )
        if counts.n_values > 1:
            for target in TARGETS:
                out[method_name(rule.name, target)] = AttributeTable(
                    rule=rule,
                    counts=counts.about(target),
                    target=target,
                    seen=seen,
                    totals=totals[target],
                )
    return out


def values_of(rule: AttributeRule, corpus: Corpus) -> tuple[Int64[np.ndarray, "row"], int]:
    """The value of every row that a kind of rule looks at, −1 for none; and how many there are."""
    values, n = corpus.attribute(rule.table), corpus.n_values(rule.table)
    if rule.name in ("family", "class"):
        value_of, n = _grouping(rule.name, corpus.vocabulary)
        values = np.where(values >= 0, value_of[values], -1)
    return values.astype(np.int64), n


def propose(table: AttributeTable, *, min_active: int = 2, min_share: float = 0.01) -> RuleSets:
    """The set of values with the best F1 for every latent, on the documents for proposing. Values
    with fewer than `min_active` activations, or less than `min_share` of them, are not worth
    naming. Members are ordered by activations."""
    counts, n_latents = table.counts, table.counts.n_latents
    active = counts.columns[PROPOSE]
    n_active = table.totals[:, PROPOSE]
    usable = np.flatnonzero(active >= min_active)
    usable = usable[active[usable] >= min_share * n_active[counts.latent[usable]]]
    latent, value = counts.latent[usable], counts.value[usable]
    active, seen = active[usable], table.seen[PROPOSING][value]
    order = np.lexsort((value, -active / (seen + 1.0), latent))
    latent, value, active, seen = latent[order], value[order], active[order], seen[order]
    first = np.searchsorted(latent, np.arange(n_latents + 1))
    place = np.arange(len(latent)) - first[latent]
    tp, m = _cumulative(active, first, latent), _cumulative(seen.astype(float), first, latent)
    f1 = np.where(place < table.rule.most, 2 * tp / (n_active[latent] + m), -1.0)
    length, best = _best_prefix(f1, place, first)
    start = np.concatenate([[0], length.cumsum()])
    member = np.arange(start[-1]) - np.repeat(start[:-1], length) + np.repeat(first[:-1], length)
    order = np.lexsort((value[member], -active[member], latent[member]))
    return RuleSets(
        attribute=table.rule.name,
        target=table.target,
        start=start,
        value=value[member][order],
        f1=best,
    )


def score(rules: RuleSets, table: AttributeTable) -> RuleScores:
    """Measure rules on the choosing and the held-out documents."""
    counts, n_latents = table.counts, table.counts.n_latents
    owner = np.repeat(np.arange(n_latents), np.diff(rules.start))
    on_set = counts.at(owner, rules.value)

    def total(column: np.ndarray, of: np.ndarray) -> Float64[np.ndarray, "latent"]:
        return np.bincount(of, weights=column, minlength=n_latents).astype(np.float64)

    tp, mass, near, chosen_tp = (total(on_set[i], owner) for i in (HELD, MASS, NEGATIVE, CHOOSE))
    m, chosen_m = (
        total(table.seen[part][rules.value].astype(float), owner) for part in (HELD_OUT, CHOOSING)
    )
    n, all_mass, all_near = table.totals[:, HELD], table.totals[:, MASS], table.totals[:, NEGATIVE]
    chosen_n, proposed = table.totals[:, CHOOSE], np.diff(rules.start) > 0
    union = n + m - tp
    low, high = wilson(tp, union)
    with np.errstate(divide="ignore", invalid="ignore"):
        jaccard = tp / union
        choice = np.where((chosen_n > 0) & proposed, 2 * chosen_tp / (chosen_n + chosen_m), np.nan)
        known = (n > 0) & proposed
        values = {
            "f1": 2 * jaccard / (1 + jaccard),
            "low": 2 * low / (1 + low),
            "high": 2 * high / (1 + high),
            "precision": tp / m,
            "recall": tp / n,
            "mass_recall": mass / all_mass,
            "near_miss": 1 - near / all_near,
        }
    return RuleScores(
        n=n.astype(np.int64),
        choice=choice,
        n_choice=chosen_n.astype(np.int64),
        **{k: np.where(known & np.isfinite(v), v, np.nan) for k, v in values.items()},
    )


def wilson(
    hits: Float64[np.ndarray, "*case"], n: Float64[np.ndarray, "*case"]
) -> tuple[Float64[np.ndarray, "*case"], Float64[np.ndarray, "*case"]]:
    """Wilson's 95 % interval of a share; NaN where n is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, z2 = hits / n, _Z * _Z
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def describe_rule(attribute: str, target: Target, values: Sequence[int], corpus: Corpus) -> str:
    """The rule in words, at most six of its values."""
    active = "active" if target == "all" else "strongly active"
    names = [_value_name(attribute, int(v), corpus) for v in values[:6]]
    listed = ", ".join(names) + (f" and {len(values) - 6} more" if len(values) > 6 else "")
    return {
        "token": f"{active} on {listed}",
        "family": f"{active} on forms of {listed}",
        "class": f"{active} on {listed}",
        "previous": f"{active} after {listed}",
        "next": f"{active} before {listed}",
        "position": f"{active} at position {listed}",
        "source": f"{active} in {listed}",
        "topic": f"{active} in documents about {listed}",
    }[attribute]


def _value_name(attribute: str, value: int, corpus: Corpus) -> str:
    match attribute:
        case "family":
            return corpus.vocabulary.quote(corpus.vocabulary.families[1][value])
        case "class":
            return CLASSES[value]
        case "position":
            edges = corpus.position_edges
            if value + 1 == len(edges):
                return f"{edges[value]}+"
            last = edges[value + 1] - 1
            return str(edges[value]) if last == edges[value] else f"{edges[value]}–{last}"
        case "source":
            return corpus.sources[value]
        case "topic":
            return corpus.labels[value]
        case _:
            return corpus.quoted(value)


def _grouping(name: str, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    if name == "class":
        return vocabulary.classes, len(CLASSES)
    index, names = vocabulary.families
    return index, len(names)


def _cumulative(
    x: np.ndarray, first: np.ndarray, latent: np.ndarray
) -> Float64[np.ndarray, "pair"]:
    """Cumulative sum inside each latent's stretch."""
    running = np.concatenate([[0.0], np.cumsum(x)])
    return running[1:] - running[first[latent]]


def _best_prefix(
    f1: np.ndarray, place: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Length of the beginning with the best F1 in every stretch (0 for an empty one), and that
    F1."""
    n_latents = len(first) - 1
    best = np.zeros(n_latents)
    filled = np.flatnonzero(np.diff(first) > 0)
    if len(filled):
        best[filled] = np.maximum.reduceat(f1, first[filled])
    length = np.zeros(n_latents, dtype=np.int64)
    owner = np.repeat(np.arange(n_latents), np.diff(first))
    hit = np.flatnonzero(f1 == best[owner])
    length[owner[hit[::-1]]] = (
        place[hit[::-1]] + 1
    )  # backwards, so that the shortest of equals stays
    return length, np.maximum(best, 0.0)
