"""How right are the features, links, lives and labels of a run whose truth is known?

For a run of a world (data/worlds), on its held-out tokens:

1. dictionary: for each fact ("depth is 2") that is known at a site, the best latent and the best
   set of latents, chosen on half of the contexts and scored on the other: F1 and Matthews'
   correlation. `unexplained` is the share of living latents that are no fact's best predictor
   (F1 below 0.5 for all). Beside it the same with the truth permuted over tokens.
2. links: a latent means a fact if its F1 is at least 0.5. Of kept best links into latents that mean
   something, those whose source means the same (or what it was split or merged from) are right.
   `rules` has the same for other rules than the run's own.
3. lives: birth and death of the latent that means a fact best, against the truth. `too_early` is
   the share of births before the fact can be known.
4. probes: the first site where a linear probe reads a variable of several values (0.9 of what is
   above the largest class).
5. labels: the share of latents that mean a fact whose label holds its words.
6. causes (parts/world_edits.py): remove a latent, or exchange it for another value's.

Cost: one encoding of the tokens a site, some matrix products, a few passes of a small model. In
a run that is of no world it finds nothing. Source: this project; F1 and MCC as in SynthSAEBench
(arXiv 2602.14687).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge
from matplotlib.figure import Figure
from typing_extensions import Doc

from data.worlds import Superposed, check_names
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.facts import Fact, Latents, Truth, f1_and_mcc, world_of
from pipeline.lenses.parts.layers import NTokens
from pipeline.lenses.parts.world_edits import edit_scores, steering_scores
from pipeline.run import Run

TITLE = "how right features, links, lives and labels are, where the truth is known"
NEEDS = ("collect", "train", "link", "describe")
MEANS = 0.5
"""F1 from which a latent means a fact."""
READS = 0.9
"""Accuracy above the largest class from which a probe reads a variable."""


class Config(Seeded):
    """How much is scored."""

    n_tokens: NTokens = 8192
    variables: Annotated[tuple[str, ...], Doc("variables to score; empty for all")] = ()
    n_set: Annotated[int, Ge(1), Doc("latents of a set at most")] = 4
    n_cases: Annotated[int, Ge(0), Doc("edits of each kind; 0 leaves the causes out")] = 64


def look(run: Run, config: Config) -> Finding:
    """Score everything. Raises UserError for a variable that the world does not have."""
    world = world_of(run)
    if world is None:
        text = "This run is of no world where the truth is known, so nothing can be scored here."
        return Finding(tables={"dictionary": pd.DataFrame(columns=["site", "fact"])}, text=text)
    truth = Truth.of(run, world, config.n_tokens)
    check_names(config.variables, list(truth.variables.values()))
    sites = [site for site in run.saes if site.is_residual]
    latents = {site: Latents.of(run, truth, site) for site in sites}
    dictionary = _dictionary(truth, latents, config)
    chance = _dictionary(truth.permuted(config.seed), latents, config)
    meaning = Meaning(truth, latents)
    tables = {
        "dictionary": _by_variable(dictionary, chance),
        "facts": dictionary,
        "sites": _sites(meaning, dictionary),
        "links": _links(run.graph.edges[run.graph.kept], meaning, sites),
        "rules": _rules(run, meaning, sites),
        "lives": _lives(run, meaning),
        "probes": _probes(run, truth, sites),
        "labels": _labels(run, meaning) if run.has("describe") else pd.DataFrame(),
    }
    if config.n_cases and not isinstance(world, Superposed):
        tables["edits"] = edit_scores(
            run, truth, latents, meaning.best, config.n_cases, config.seed
        )
        tables["steering"] = steering_scores(
            run, truth, latents, dictionary, config.n_cases, config.seed
        )
    tables = {name: table for name, table in tables.items() if len(table)}
    headline = _headline(tables, chance)
    return Finding(
        tables=tables,
        text=_text(world.kind, headline),
        headline=headline,
        figure=lambda: _draw(tables["dictionary"]),
        columns=_columns(meaning),
    )


class Meaning:
    """Which fact each latent means: F1 of every (latent, fact) that is known at its site."""

    def __init__(self, truth: Truth, latents: Mapping[Site, Latents]) -> None:
        everywhere = np.ones(len(truth.scoring), dtype=bool)
        self.truth, self.latents = truth, latents
        self.facts: dict[Site, list[Fact]] = {}
        self.f1: dict[Site, np.ndarray] = {}
        for site, here in latents.items():
            known = [fact for fact in truth.facts if fact.variable.known_at(site.layer)]
            scores = [here.f1(f, everywhere).reshape(-1, here.n_latents).max(0) for f in known]
            self.facts[site] = known
            self.f1[site] = np.array(scores).reshape(len(known), here.n_latents)

    def of(self, site: Site, latent: int) -> Fact | None:
        """The fact that the latent means best."""
        scores = self.f1[site][:, latent]
        if not len(scores) or scores.max() < MEANS:
            return None
        return self.facts[site][int(scores.argmax())]

    def share(self, site: Site, latent: int, fact: Fact) -> float:
        """F1 of a latent and a fact; 0 where the fact is not known."""
        names = [known.name for known in self.facts[site]]
        return float(self.f1[site][names.index(fact.name), latent]) if fact.name in names else 0.0

    def sources(self, fact: Fact) -> list[str]:
        """The fact itself, and those that it was split or merged from."""
        older = [f.name for f in self.truth.facts if fact.variable.name in f.variable.heirs]
        return [fact.name, *older]

    def best(self, site: Site, fact: Fact) -> int | None:
        """The latent that means a fact best at a site, if one does."""
        for place, known in enumerate(self.facts[site]):
            if known.name == fact.name and self.f1[site][place].max() >= MEANS:
                return int(self.f1[site][place].argmax())
        return None


def _dictionary(truth: Truth, latents: Mapping[Site, Latents], config: Config) -> pd.DataFrame:
    """One row a fact and site where it is known."""
    rows = []
    for site, here in latents.items():
        for fact in truth.facts:
            wanted = not config.variables or fact.variable.name in config.variables
            if not wanted or not fact.variable.known_at(site.layer):
                continue
            f1 = here.f1(fact, ~truth.scoring)
            chosen = here.best_set(fact, ~truth.scoring, f1, config.n_set)
            one = f1_and_mcc(here.on[:, chosen[0]], fact, truth.scoring)
            union = f1_and_mcc(np.any(here.on[:, chosen], axis=1), fact, truth.scoring)
            rows.append(
                {
                    "site": site.short,
                    "layer": site.layer,
                    "variable": fact.variable.name,
                    "fact": fact.name,
                    "n_true": int(fact.true.sum()),
                    "best_feature": f"{site.short}/{here.latent_of(chosen[0])}",
                    "f1": one[0],
                    "mcc": one[1],
                    "n_set": len({here.latent_of(each) for each in chosen}),
                    "set_f1": union[0],
                    "set_mcc": union[1],
                    "members": " ".join(str(here.latent_of(each)) for each in chosen),
                }
            )
    return pd.DataFrame(rows)


def _by_variable(dictionary: pd.DataFrame, chance: pd.DataFrame) -> pd.DataFrame:
    """Means over the values of a variable, at each site."""
    keys = ["variable", "site", "layer"]
    columns = ["f1", "mcc", "set_f1", "set_mcc"]
    found = dictionary.groupby(keys, sort=False)[columns].mean()
    found.insert(0, "n_facts", dictionary.groupby(keys, sort=False).size())
    permuted = chance.groupby(keys, sort=False)[["f1", "set_f1"]].mean()
    return found.join(permuted.add_suffix("_permuted")).reset_index()


def _sites(meaning: Meaning, dictionary: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for site, here in meaning.latents.items():
        alive = np.flatnonzero(here.alive)
        means = np.array([meaning.of(site, int(latent)) is not None for latent in alive])
        facts = dictionary[dictionary["site"] == site.short]
        rows.append(
            {
                "site": site.short,
                "n_alive": len(alive),
                "unexplained": float(1 - means.mean()) if len(alive) else np.nan,
                "n_facts": len(facts),
                "f1": facts["f1"].mean(),
                "set_f1": facts["set_f1"].mean(),
            }
        )
    return pd.DataFrame(rows)


def _rules(run: Run, meaning: Meaning, sites: Sequence[Site]) -> pd.DataFrame:
    """Recall and false share of best links under other rules than the run's own."""
    edges = run.graph.edges
    rules = {"as linked": edges["kept"], "every best link": edges["rank"] == 0}
    if "related" in edges:
        rules["without the partner's test"] = edges["related"].astype(bool)
    if edges["pearson"].notna().any():
        rules |= {f"correlation ≥ {least}": edges["pearson"] >= least for least in (0.3, 0.5)}
    rows = []
    for name, kept in rules.items():
        links = _links(edges[kept.to_numpy(bool)], meaning, sites)
        shares = _link_shares(links) if len(links) else {}
        rows.append({"rule": name, "n_judged": links["n_judged"].sum(), **shares})
    return pd.DataFrame(rows)


def _link_shares(links: pd.DataFrame) -> dict[str, float]:
    return {
        "recall": links["n_found"].sum() / max(links["n_linkable"].sum(), 1),
        "false_share": 1 - links["n_right"].sum() / max(links["n_judged"].sum(), 1),
    }


def _links(kept: pd.DataFrame, meaning: Meaning, sites: Sequence[Site]) -> pd.DataFrame:
    """One row a pair of neighbouring sites, for the best ones of these links."""
    best = kept[(kept["relation"] == "residual") & (kept["rank"] == 0)]
    rows = []
    for source, target in pairwise(sites):
        here = best[(best["source_site"] == source.short) & (best["target_site"] == target.short)]
        linked = dict(zip(here["target_latent"], here["source_latent"], strict=True))
        counts = dict.fromkeys(("n_linkable", "n_found", "n_judged", "n_right"), 0)
        for latent in np.flatnonzero(meaning.latents[target].alive):
            fact = meaning.of(target, int(latent))
            if fact is None:
                continue
            right = _sources_at(meaning, source, fact)
            counts["n_linkable"] += bool(right)
            if latent in linked:
                is_right = linked[latent] in right
                counts["n_judged"] += 1
                counts["n_right"] += is_right
                counts["n_found"] += is_right
        rows.append({"source_site": source.short, "target_site": target.short, **counts})
    table = pd.DataFrame(rows)
    if len(table):
        table["recall"] = table["n_found"] / table["n_linkable"].clip(lower=1)
        table["false_share"] = 1 - table["n_right"] / table["n_judged"].clip(lower=1)
    return table


def _sources_at(meaning: Meaning, site: Site, fact: Fact) -> set[int]:
    """Latents at a site that mean the fact, or what it was split or merged from."""
    names = meaning.sources(fact)
    places = [i for i, known in enumerate(meaning.facts[site]) if known.name in names]
    scores = meaning.f1[site]
    return {int(latent) for i in places for latent in np.flatnonzero(scores[i] >= MEANS)}


def _lives(run: Run, meaning: Meaning) -> pd.DataFrame:
    """One row a fact: birth and death of the latents that mean it best where it is known last and
    first."""
    nodes = run.graph.nodes.set_index(["site", "latent"])
    sites = list(meaning.latents)
    rows = []
    for fact in meaning.truth.facts:
        known = [site for site in sites if fact.variable.known_at(site.layer)]
        found = {site: meaning.best(site, fact) for site in known}
        if not known or found[known[-1]] is None:
            continue
        birth = int(nodes.loc[(known[-1].short, found[known[-1]]), "birth_layer"])
        row = {
            "fact": fact.name,
            "variable": fact.variable.name,
            "born": known[0].layer,
            "birth": birth,
            "birth_error": birth - known[0].layer,
            "birth_right": birth in _births(meaning, fact, known[0].layer),
            "too_early": birth < min(_births(meaning, fact, known[0].layer)),
            "last": known[-1].layer,
        }
        if found[known[0]] is not None:
            death = int(nodes.loc[(known[0].short, found[known[0]]), "death_layer"])
            row |= {"death": death, "death_right": death == known[-1].layer}
        rows.append(row)
    return pd.DataFrame(rows)


def _births(meaning: Meaning, fact: Fact, born: int) -> set[int]:
    """Layers at which its feature may be said to begin: its own, or that of what it came from."""
    older = [f.variable.born for f in meaning.truth.facts if f.name in meaning.sources(fact)]
    return {born, *older}


def _probes(run: Run, truth: Truth, sites: Sequence[Site]) -> pd.DataFrame:
    """One row a variable: what a ridge regression reads at each site, and the first site where it
    reads the variable."""
    designs = {site: _design(truth.rows(truth.activations(run, site))) for site in sites}
    rows = []
    for variable in truth.variables.values():
        value = truth.rows(variable.value)
        defined = value >= 0
        choose, score = defined & ~truth.scoring, defined & truth.scoring
        if len(variable.names) == 1 or min(choose.sum(), score.sum()) < 50:
            continue
        skill = {}
        for site, x in designs.items():
            skill[site.short] = _skill(x[choose], value[choose], x[score], value[score])
        first = next((site.layer for site in sites if skill[site.short] >= READS), None)
        rows.append(
            {
                "variable": variable.name,
                "born": max(variable.born, sites[0].layer),
                "first_read": first,
                "right": first == max(variable.born, sites[0].layer),
            }
            | {f"skill_{name}": share for name, share in skill.items()}
        )
    return pd.DataFrame(rows)


def _design(x: np.ndarray) -> np.ndarray:
    centred = (x - x.mean(0)) / max(float(x.std()), 1e-12)
    return np.concatenate([centred, np.ones((len(x), 1))], axis=1)


def _skill(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray) -> float:
    """Accuracy of a ridge regression to one-hot values, above that of the largest class."""
    wanted = np.eye(int(max(y.max(), y_new.max())) + 1)[y]
    gram = x.T @ x + 1e-2 * len(x) / x.shape[1] * np.eye(x.shape[1])
    read = (x_new @ np.linalg.solve(gram, x.T @ wanted)).argmax(1)
    largest = np.bincount(y_new).max() / len(y_new)
    return float(((read == y_new).mean() - largest) / max(1 - largest, 1e-9))


def _labels(run: Run, meaning: Meaning) -> pd.DataFrame:
    """One row a latent that means a fact: its label, and whether that holds the fact's words."""
    rows = []
    for site, here in meaning.latents.items():
        for latent in np.flatnonzero(here.alive):
            fact = meaning.of(site, int(latent))
            if fact is None:
                continue
            feature = f"{site.short}/{latent}"
            label = run.labels[feature]
            words = meaning.truth.world.spelling(fact.variable, fact.number)
            held = set(re.findall(r"[a-z]+|[^\s‘’,]+", label))
            named = {"feature": feature, "fact": fact.name, "label": label}
            rows.append(named | {"variable": fact.variable.name, "named": held >= set(words)})
    return pd.DataFrame(rows)


def _headline(tables: Mapping[str, pd.DataFrame], chance: pd.DataFrame) -> dict[str, Any]:
    facts, sites = tables["facts"], tables["sites"]
    numbers: dict[str, Any] = {
        "f1": facts["f1"].mean(),
        "set_f1": facts["set_f1"].mean(),
        "mcc": facts["mcc"].mean(),
        "f1_permuted": chance["f1"].mean(),
        "unexplained": sites["unexplained"].mean(),
    }
    if "links" in tables:
        shares = _link_shares(tables["links"])
        numbers |= {f"link_{name}": share for name, share in shares.items()}
    if "lives" in tables:
        lives = tables["lives"]
        numbers["birth_right"] = lives["birth_right"].mean()
        numbers["birth_too_early"] = lives["too_early"].mean()
        if "death_right" in lives:
            numbers["death_right"] = lives["death_right"].dropna().astype(float).mean()
    if "probes" in tables:
        numbers["probe_right"] = tables["probes"]["right"].mean()
    if "labels" in tables:
        numbers["label_named"] = tables["labels"]["named"].mean()
    if "edits" in tables:
        for way, rows in tables["edits"].groupby("way"):
            for column in ("own", "downstream", "others"):
                numbers[f"{way}_{column}"] = rows[column].mean()
    if "steering" in tables:
        best = tables["steering"].sort_values("legal").iloc[-1]
        numbers["steered_legal"], numbers["unsteered_legal"] = best["legal"], best["unsteered"]
    return {name: round(float(value), 4) for name, value in numbers.items()}


def _text(kind: str, headline: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in headline.items())
    return (
        f"Scores against the truth of the world `{kind}`: {told}. F1 is that of the best latent of "
        "each fact, `set f1` that of its best set. `link recall` and `link false share` are about "
        "best links into latents that mean a fact. Read all beside an untrained model and a truth "
        "that is permuted: what they reach too says nothing."
    )


def _draw(dictionary: pd.DataFrame) -> Figure:
    columns = {"f1": "F1 of the best latent", "set_f1": "F1 of the best set"}
    if dictionary["variable"].nunique() > 12:
        dictionary = dictionary.assign(variable="all")
        dictionary = dictionary.groupby(["variable", "layer"], as_index=False)[list(columns)].mean()
    return lines(dictionary, x="layer", line="variable", columns=columns)


def _columns(meaning: Meaning) -> pd.DataFrame | None:
    rows = []
    for site, here in meaning.latents.items():
        for latent in np.flatnonzero(here.alive):
            if (fact := meaning.of(site, int(latent))) is not None:
                share = round(meaning.share(site, int(latent), fact), 3)
                rows.append({"feature": f"{site.short}/{latent}", "means": fact.name, "F1": share})
    return pd.DataFrame(rows) if rows else None
