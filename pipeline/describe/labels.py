"""Labels of a site: several per latent, each with how well it did on documents it was not made
from.

1. every kind of rule is proposed, and judged on documents of their own
   (pipeline/describe/rules.py): the one that did best there is the latent's rule, about all
   activations and about strong ones;
2. tokens that are typical of the latent by log-odds (Monroe et al. 2008, Dirichlet prior) and by
   class-TF-IDF, and tokens
   that its decoder promotes, are descriptions; they are scored as rules too ("active on", "active
   before"), and seldom pass;
3. the rule of the best predecessor in the flow graph is scored on the latent itself: an inherited
   label with provenance;
4. a rule is *accepted* from `min_f1` on those choosing documents, with at least `min_active`
   held-out activations. The score comes from the held-out documents, which chose nothing, so it may
   lie below the threshold. Without an accepted rule the label is "no simple rule", with the score
   that the best rule reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from pipeline.describe.columns import largest_places
from pipeline.describe.corpus import PROPOSING, Corpus
from pipeline.describe.counts import PROPOSE
from pipeline.describe.rules import (
    METHOD_RULES,
    TARGETS,
    AttributeTable,
    RuleScores,
    RuleSets,
    describe_rule,
    method_name,
    propose,
    score,
)

NO_RULE = "no simple rule"
TOO_RARE = "too rare to label"
DESCRIPTIONS = ("log_odds", "ctfidf", "promotes")
N_TYPICAL = 5
_PRIOR = 1000.0
_SAYS_SOMETHING = 0.1

Weigh = Callable[[AttributeTable, Int64[np.ndarray, "usable"]], Float64[np.ndarray, "usable"]]
"""How typical each usable (latent, token) pair is."""


@dataclass(frozen=True)
class Method:
    """A way of making labels. `kind`: rule | tokens | output | flow | none | model | human."""

    name: str
    kind: str
    about: str


METHODS: tuple[Method, ...] = (
    *(
        Method(
            name,
            "rule",
            r.about.replace("active", "strongly active" if name != r.name else "active"),
        )
        for name, r in METHOD_RULES.items()
    ),
    Method(
        "log_odds",
        "tokens",
        "tokens typical of its strong activations by log-odds, Dirichlet prior",
    ),
    Method("ctfidf", "tokens", "tokens typical of its strong activations by class-TF-IDF"),
    Method(
        "promotes", "output", "tokens its decoder direction promotes; scored as: active before them"
    ),
    Method("inherited", "flow", "the rule of its best predecessor, scored on this feature"),
    Method("none", "none", "no rule reached the threshold; the score is that of the best one"),
    Method("model", "model", "written by a language model"),
    Method("human", "human", "written by a person"),
    Method("imported", "human", "imported from another atlas or site"),
)
RULE_METHODS = tuple(METHOD_RULES)
METHOD_INDEX = {method.name: i for i, method in enumerate(METHODS)}


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What a rule must reach on the choosing documents to be accepted, and how many held-out
    activations its score takes (half as many on the choosing documents, of which there are
    fewer)."""

    min_f1: float = 0.6
    min_active: int = 5


@dataclass(frozen=True, kw_only=True)
class Label:
    """One label of one latent. Scores are None where nothing could be measured; `choice` is the F1
    on the documents that decided. `origin` is a feature id. `rule` (a key of METHOD_RULES) and
    `values` say what the text says, for programs."""

    text: str
    method: str
    accepted: bool = False
    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    precision: float | None = None
    recall: float | None = None
    mass_recall: float | None = None
    near_miss: float | None = None
    choice: float | None = None
    origin: str | None = None
    cosine: float | None = None
    rule: str | None = None
    values: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A rule per latent with its scores."""

    rules: RuleSets
    scores: RuleScores

    def passes(self, latent: int, need: Acceptance) -> bool:
        """Whether one latent's rule reaches the threshold."""
        s = self.scores
        enough = s.n[latent] >= need.min_active and 2 * s.n_choice[latent] >= need.min_active
        return bool(s.choice[latent] >= need.min_f1 and enough)


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteRules:
    """All rules of one site by method, and which method is each latent's best for either target
    (index into RULE_METHODS; −1: none was proposed)."""

    by_method: Mapping[str, Scored]
    best: Int64[np.ndarray, "target latent"]

    def accepted(self, need: Acceptance) -> Int64[np.ndarray, "latent"]:
        """The method whose rule is each latent's best and passes: about all activations if one
        does, else about strong ones; −1 for none."""
        out = np.full(self.best.shape[1], -1, dtype=np.int64)
        for best in self.best[::-1]:
            for i, name in enumerate(RULE_METHODS):
                if name in self.by_method:
                    out[(best == i) & passes(self.by_method[name].scores, need)] = i
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Inherited:
    """Rules taken over from predecessors: per latent the predecessor's id, the cosine, and the rule
    (by attribute)."""

    origin: list[str | None]
    cosine: Float32[np.ndarray, "latent"]
    by_attribute: Mapping[str, Scored]


def make_rules(
    tables: Mapping[str, AttributeTable], promotes: Int64[np.ndarray, "latent ten"] | None
) -> SiteRules:
    """Propose and score every kind of rule and description."""
    by_method = {name: scored(propose(table), table) for name, table in tables.items()}
    if token := tables.get("strong_token"):
        by_method["log_odds"] = scored(typical_tokens(token, _log_odds), token)
        by_method["ctfidf"] = scored(typical_tokens(token, _class_tf_idf), token)
    if promotes is not None and (following := tables.get("next")):
        listed = promotes[:, :N_TYPICAL]
        start = np.arange(len(listed) + 1) * listed.shape[1]
        rules = RuleSets(
            attribute="next",
            target="all",
            start=start,
            value=listed.ravel().astype(np.int64),
            f1=np.zeros(len(listed)),
        )
        by_method["promotes"] = scored(rules, following)
    return SiteRules(by_method=by_method, best=_best(by_method))


def passes(scores: RuleScores, need: Acceptance) -> np.ndarray:
    """Which latents' rules reach the threshold."""
    enough = (scores.n >= need.min_active) & (2 * scores.n_choice >= need.min_active)
    return (np.nan_to_num(scores.choice) >= need.min_f1) & enough


def typical_tokens(table: AttributeTable, weigh: Weigh) -> RuleSets:
    """The few tokens with the largest positive weight for every latent, on the documents for
    proposing."""
    usable = np.flatnonzero(table.counts.columns[PROPOSE] >= 1)
    weight = np.maximum(weigh(table, usable), 0)
    place, rows = largest_places(table.counts.latent[usable], weight, N_TYPICAL)
    latent = table.counts.latent[usable][rows]
    length = np.bincount(latent, minlength=table.counts.n_latents)
    order = np.lexsort((place, latent))
    return RuleSets(
        attribute="token",
        target=table.target,
        start=np.concatenate([[0], length.cumsum()]),
        value=table.counts.value[usable][rows][order],
        f1=np.zeros(table.counts.n_latents),
    )


def labels_of(
    latent: int,
    count: int,
    rules: SiteRules,
    inherited: Inherited | None,
    corpus: Corpus,
    need: Acceptance,
) -> list[Label]:
    """The labels of one latent, best first; empty for one that was never active."""
    if not count:
        return []
    made = [
        label for label in _candidates(latent, rules, inherited, corpus, need) if label is not None
    ]
    accepted = sorted((x for x in made if x.accepted), key=lambda x: -(x.choice or 0))
    rest = [
        x for x in made if not x.accepted and (x.method in ("log_odds", "inherited") or _holds(x))
    ]
    return [*accepted, *([] if accepted else [_no_rule(latent, rules, need)]), *rest]


def shown_text(labels: list[Label], example: str = "") -> str:
    """The one line for lists and search: the best label; after "no simple rule", what the feature
    is strongest on if that held on other documents too, else an example."""
    if not labels:
        return ""
    if labels[0].accepted:
        return labels[0].text
    often = next(
        (label.text for label in labels if label.method == "log_odds" and _holds(label)), None
    )
    more = often or (f"as in “{example}”" if example else "")
    return f"{labels[0].text} · {more}" if more else labels[0].text


def _holds(label: Label) -> bool:
    """Whether a description says something of other documents at all."""
    return label.method in DESCRIPTIONS and (label.score or 0) >= _SAYS_SOMETHING


def _candidates(
    latent: int, rules: SiteRules, inherited: Inherited | None, corpus: Corpus, need: Acceptance
) -> Iterator[Label | None]:
    for best in rules.best[:, latent]:
        if best >= 0:
            name = RULE_METHODS[best]
            yield _label(latent, name, rules.by_method[name], corpus, need)
    if inherited is not None and inherited.origin[latent] is not None:
        for rule in inherited.by_attribute.values():
            yield _label(
                latent,
                "inherited",
                rule,
                corpus,
                need,
                origin=inherited.origin[latent],
                cosine=round(float(inherited.cosine[latent]), 4),
            )
    for name in ("log_odds", "promotes"):
        if name in rules.by_method:
            yield _label(latent, name, rules.by_method[name], corpus, need)


def _label(
    latent: int,
    method: str,
    rule: Scored,
    corpus: Corpus,
    need: Acceptance,
    *,
    origin: str | None = None,
    cosine: float | None = None,
) -> Label | None:
    values = rule.rules.of(latent)
    if not len(values):
        return None
    s = rule.scores
    return Label(
        text=_text(method, rule.rules, values, corpus),
        method=method,
        accepted=method not in DESCRIPTIONS and rule.passes(latent, need),
        score=_number(s.f1[latent]),
        n=int(s.n[latent]),
        **{name: _number(getattr(s, name)[latent]) for name in _MEASURES},
        origin=origin,
        cosine=cosine,
        rule=method_name(rule.rules.attribute, rule.rules.target),
        values=tuple(values.tolist()),
    )


_MEASURES = ("low", "high", "precision", "recall", "mass_recall", "near_miss", "choice")


def _text(method: str, rules: RuleSets, values: Int64[np.ndarray, "value"], corpus: Corpus) -> str:
    if method in DESCRIPTIONS:
        listed = ", ".join(corpus.quoted(int(v)) for v in values[:N_TYPICAL])
        return f"promotes {listed}" if method == "promotes" else f"strongest on {listed}"
    return describe_rule(rules.attribute, rules.target, values.tolist(), corpus)


def _no_rule(latent: int, rules: SiteRules, need: Acceptance) -> Label:
    """Which of the two it is: no rule was good enough, or there is too little to say so."""
    best = int(rules.best[0, latent])
    if best < 0:
        return Label(text=TOO_RARE, method="none")
    scores = rules.by_method[RULE_METHODS[best]].scores
    n = int(scores.n[latent])
    if n < need.min_active:
        return Label(text=TOO_RARE, method="none", n=n)
    return Label(
        text=NO_RULE,
        method="none",
        n=n,
        score=_number(scores.f1[latent]),
        low=_number(scores.low[latent]),
        high=_number(scores.high[latent]),
    )


def _best(by_method: Mapping[str, Scored]) -> Int64[np.ndarray, "target latent"]:
    """For either target the method with the best F1 on the choosing documents; of near equals
    (0.02) the earlier, plainer one. What was proposed but never right there still counts as
    proposed."""
    n = len(next(iter(by_method.values())).rules.f1)
    best = np.full((len(TARGETS), n), -1, dtype=np.int64)
    for row, target in enumerate(TARGETS):
        f1 = np.zeros(n)
        for i, name in enumerate(RULE_METHODS):
            if name in by_method and by_method[name].rules.target == target:
                proposed = 1e-6 * (by_method[name].rules.f1 > 0)
                choice = np.maximum(np.nan_to_num(by_method[name].scores.choice), proposed)
                better = choice > np.where(f1 > 0, f1 + 0.02, 0.0)
                best[row, better], f1[better] = i, choice[better]
    return best


def scored(rules: RuleSets, table: AttributeTable) -> Scored:
    """Rules with their held-out scores."""
    return Scored(rules=rules, scores=score(rules, table))


def _log_odds(
    table: AttributeTable, pairs: Int64[np.ndarray, "usable"]
) -> Float64[np.ndarray, "usable"]:
    """z of the log-odds of a token among activations against the rest of the text; the prior is the
    corpus itself."""
    y = table.counts.columns[PROPOSE][pairs]
    latent, value = table.counts.latent[pairs], table.counts.value[pairs]
    n = table.totals[latent, PROPOSE]
    seen = table.seen[PROPOSING]
    all_n, all_y = float(seen.sum()), seen[value].astype(float)
    prior = _PRIOR * (all_y + 0.5) / all_n
    rest_y, rest_n = np.maximum(all_y - y, 0), np.maximum(all_n - n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.log((y + prior) / np.maximum(n + _PRIOR - y - prior, 1e-9))
        outside = np.log((rest_y + prior) / np.maximum(rest_n + _PRIOR - rest_y - prior, 1e-9))
        z = (inside - outside) / np.sqrt(1 / (y + prior) + 1 / (rest_y + prior))
    return np.nan_to_num(z)


def _class_tf_idf(
    table: AttributeTable, pairs: Int64[np.ndarray, "usable"]
) -> Float64[np.ndarray, "usable"]:
    """p_f(t) · ln(1 + A / Σ_f n_f(t)), with p_f the share of activations and A the mean number of
    activations of a latent."""
    active = table.counts.columns[PROPOSE]
    latent, value = table.counts.latent[pairs], table.counts.value[pairs]
    everywhere = np.bincount(table.counts.value, weights=active, minlength=table.counts.n_values)
    mean = max(table.totals[:, PROPOSE].mean(), 1e-12)
    share = active[pairs] / np.maximum(table.totals[latent, PROPOSE], 1e-12)
    return share * np.log1p(mean / np.maximum(everywhere[value], 1e-12))


def _number(value: float) -> float | None:
    value = float(value)
    return None if math.isnan(value) else round(value, 4)
