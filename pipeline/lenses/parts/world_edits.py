"""Edits of a world's model at one token, and what they change: the causes of the scorecard.

An edit happens at one token of one context: `remove` takes a latent's part away where its fact is
true; `exchange` takes away the latent of the value that is there and adds that of another value, as
strong as it is on average where that value is true.

`edit_scores` reads every variable at the last residual site with linear probes that were fitted on
unedited contexts, at the edited token:

    own          remove: the reading of the latent's variable changes; exchange: it becomes the
    value
    downstream   the readings of variables that are computed from it after the site change
    others       the readings of all other variables change (nothing should)

`steering_scores` exchanges the sets of latents of a variable that decides what may follow, and lets
the model go on: `legal` is the share of continuations that the world allows after the new value,
`unsteered` and `control` (random living latents, as strong) the same share without it.
Cost: two passes of the model a site and way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.worlds import NEVER, Variable
from featureflow.sites import Site
from pipeline.lenses.parts.facts import Fact, Latents, Truth
from pipeline.run import Run

Best = Callable[[Site, Fact], int | None]
Probes = Mapping[str, Float[np.ndarray, "d value"]]


@dataclass(kw_only=True, eq=False)
class _Case:
    """One edit: where, of which variable, from which value to which (NEVER: removed)."""

    context: int
    position: int
    variable: Variable
    old: int
    new: int
    delta: Float[Tensor, "d"] = field(default_factory=lambda: torch.zeros(0))


def edit_scores(
    run: Run, truth: Truth, latents: Mapping[Site, Latents], best: Best, n_cases: int, seed: int
) -> pd.DataFrame:
    """One row a site and way."""
    sites = list(latents)
    probes = _fitted(run, truth, sites[-1])
    rows = []
    for site in sites:
        facts = [(fact, best(site, fact)) for fact in truth.facts]
        means = {fact.name: (fact, latent) for fact, latent in facts if latent is not None}
        for way in ("remove", "exchange"):
            rng = np.random.default_rng([seed, site.layer, len(way)])
            cases = _drawn(run, truth, latents[site], means, way, n_cases, rng)
            if cases:
                changed = _changed(run.exact_model, truth, site, sites[-1], cases, probes)
                rows.append({"site": site.short, "way": way, "n_cases": len(cases), **changed})
    return pd.DataFrame(rows)


def _drawn(
    run: Run,
    truth: Truth,
    here: Latents,
    means: Mapping[str, tuple[Fact, int]],
    way: str,
    n: int,
    rng: np.random.Generator,
) -> list[_Case]:
    """Facts in turn, each at a token of the scoring half where its latent is active."""
    rows = run.saes[here.site].W_dec
    names, cases = list(means), []
    for number in range(n if names else 0):
        fact, latent = means[names[int(rng.integers(len(names)))]]
        places = np.flatnonzero(fact.true & truth.scoring & (here.z[:, latent] > 0))
        if not len(places):
            continue
        row = int(places[rng.integers(len(places))])
        context, position = divmod(row, truth.ids.shape[1] - 1)
        case = _Case(
            context=context,
            position=position + 1,
            variable=fact.variable,
            old=fact.number,
            new=NEVER,
            delta=-float(here.z[row, latent]) * rows[latent],
        )
        if way == "exchange":
            others = [
                (f, j) for f, j in means.values() if f.variable is fact.variable and f is not fact
            ]
            if not others:
                continue
            other, its = others[number % len(others)]
            strength = float(here.z[other.true & ~truth.scoring, its].mean())
            case.new, case.delta = other.number, case.delta + strength * rows[its]
        cases.append(case)
    return cases


def _changed(
    model: LanguageModel,
    truth: Truth,
    site: Site,
    last: Site,
    cases: Sequence[_Case],
    probes: Probes,
) -> dict[str, float]:
    """Means over cases of what the probes read otherwise."""
    ids = torch.from_numpy(truth.ids[[case.context for case in cases]])
    before, plain = _read(model, ids, last, cases, probes)
    with model.edited({site: _adding(cases)}):
        after, edited = _read(model, ids, last, cases, probes)
    shares: dict[str, list[float]] = {"own": [], "downstream": [], "others": []}
    for i, case in enumerate(cases):
        below = _descendants(truth, case.variable.name, site.layer)
        for name, variable in truth.variables.items():
            if name not in probes or variable.value[case.context, case.position] == NEVER:
                continue
            is_other = bool(after[name][i] != before[name][i])
            if name == case.variable.name:
                became = bool(after[name][i] == case.new)
                shares["own"].append(became if case.new != NEVER else is_other)
            else:
                shares["downstream" if name in below else "others"].append(is_other)
    kl = (plain.exp() * (plain - edited)).sum(-1).mean()
    means = {name: float(np.mean(each)) if each else np.nan for name, each in shares.items()}
    return means | {"kl": float(kl)}


def _descendants(truth: Truth, name: str, layer: int) -> set[str]:
    """Variables that are computed from `name` in blocks after this layer."""
    found, waiting = set(), [name]
    while waiting:
        parent = waiting.pop()
        for child in truth.variables.values():
            if parent in child.parents and child.born > layer and child.name not in found:
                found.add(child.name)
                waiting.append(child.name)
    return found


def _read(
    model: LanguageModel,
    ids: Int64[Tensor, "case position"],
    last: Site,
    cases: Sequence[_Case],
    probes: Probes,
) -> tuple[dict[str, Int64[np.ndarray, "case"]], Float[Tensor, "case vocab"]]:
    """What every probe reads at the edited tokens, and the log-probabilities there."""
    at = torch.arange(len(cases)), torch.tensor([case.position for case in cases])
    with model.recorded([last]) as seen:
        logits = model.logits(ids)
    x = seen[last][at].float().cpu().numpy()
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    read = {name: (x @ probe).argmax(1) for name, probe in probes.items()}
    return read, logits[at].float().log_softmax(-1).cpu()


def _fitted(run: Run, truth: Truth, site: Site) -> Probes:
    """Ridge regressions to the values of each variable that is known at the site, in the units of
    the activation."""
    x = truth.rows(truth.activations(run, site)).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    probes = {}
    for name, variable in truth.variables.items():
        value = truth.rows(variable.value)
        rows = (value != NEVER) & ~truth.scoring
        if not variable.known_at(site.layer) or rows.sum() < 50:
            continue
        gram = x[rows].T @ x[rows] + 1e-3 * rows.sum() * x[:, :-1].var() * np.eye(x.shape[1])
        wanted = np.eye(len(variable.names))[value[rows]]
        probes[name] = np.linalg.solve(gram, x[rows].T @ wanted)
    return probes


def _adding(cases: Sequence[_Case]) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        for i, case in enumerate(cases):
            x[i, case.position] += case.delta.to(x)
        return x

    return edit


def steering_scores(
    run: Run,
    truth: Truth,
    latents: Mapping[Site, Latents],
    dictionary: pd.DataFrame,
    n_cases: int,
    seed: int,
) -> pd.DataFrame:
    """One row a site and steered variable."""
    rows = []
    for site, here in latents.items():
        for name in truth.world.STEERED:
            rng = np.random.default_rng([seed, site.layer, 7])
            facts = {f.number: f for f in truth.facts if f.variable.name == name}
            of_site = dictionary[dictionary["site"] == site.short].set_index("fact")
            members = {
                number: [int(each) for each in of_site.loc[fact.name, "members"].split()]
                for number, fact in facts.items()
                if fact.name in of_site.index and of_site.loc[fact.name, "set_f1"] >= 0.5
            }
            cases = _moves(truth, name, sorted(members), n_cases, rng)
            if not cases:
                continue
            strength = {
                number: here.z[fact.true & ~truth.scoring].mean(0) for number, fact in facts.items()
            }
            steered = _exchanged(run, truth, here, cases, members, strength)
            control = _controls(run, here, steered, rng)
            found = {
                "legal": _legal_share(run.exact_model, truth, site, steered, seed),
                "control": _legal_share(run.exact_model, truth, site, control, seed),
                "unsteered": _legal_share(run.exact_model, truth, site, cases, seed),
            }
            reachable = len(members) / max(len(facts), 1)
            about = {"site": site.short, "variable": name, "n_cases": len(cases)}
            rows.append(about | {"reachable": reachable} | found)
    return pd.DataFrame(rows)


def _moves(
    truth: Truth, name: str, targets: Sequence[int], n: int, rng: np.random.Generator
) -> list[_Case]:
    """Tokens of the scoring half where the variable is known and there is room to go on, each with
    another value to steer to."""
    variable = truth.variables[name]
    known = variable.value != NEVER
    known[0::2] = False
    places = np.argwhere(known)
    cases: list[_Case] = []
    for context, position in places[rng.permutation(len(places))]:
        old = int(variable.value[context, position])
        choices = [target for target in targets if target != old]
        if not choices or len(cases) == n:
            break
        new = choices[int(rng.integers(len(choices)))]
        ways = truth.world.continuations(name, new, truth.ids[context, : position + 1])
        if ways and position + len(ways[0]) < truth.ids.shape[1]:
            d = torch.zeros(0)
            cases.append(
                _Case(
                    context=int(context),
                    position=int(position),
                    variable=variable,
                    old=old,
                    new=new,
                    delta=d,
                )
            )
    return cases


def _exchanged(
    run: Run,
    truth: Truth,
    here: Latents,
    cases: Sequence[_Case],
    members: Mapping[int, list[int]],
    strength: Mapping[int, Float[np.ndarray, "latent"]],
) -> list[_Case]:
    """The cases with the set of the old value taken away and that of the new one added."""
    W_dec = run.saes[here.site].W_dec
    width = truth.ids.shape[1] - 1
    found = []
    for case in cases:
        z = here.z[case.context * width + case.position - 1]
        change = torch.zeros(len(z))
        for latent in members.get(case.old, []):
            change[latent] -= float(z[latent])
        for latent in members[case.new]:
            change[latent] += float(strength[case.new][latent])
        found.append(_Case(**{**vars(case), "delta": change.to(W_dec) @ W_dec}))
    return found


def _controls(
    run: Run, here: Latents, cases: Sequence[_Case], rng: np.random.Generator
) -> list[_Case]:
    """A random living latent instead, as long as the edit."""
    W_dec = run.saes[here.site].W_dec
    alive = np.flatnonzero(here.alive)
    return [
        _Case(**{**vars(case), "delta": float(case.delta.norm()) * W_dec[int(rng.choice(alive))]})
        for case in cases
    ]


def _legal_share(
    model: LanguageModel, truth: Truth, site: Site, cases: Sequence[_Case], seed: int
) -> float:
    """Sample a continuation in each case, the edit staying where it is; the share that the world
    allows after the new value."""
    ids = torch.from_numpy(truth.ids[[case.context for case in cases]].copy())
    name = cases[0].variable.name
    allowed = [
        truth.world.continuations(name, case.new, truth.ids[case.context, : case.position + 1])
        for case in cases
    ]
    generator = torch.Generator().manual_seed(seed)
    edits = {site: _adding(cases)} if len(cases[0].delta) else {}
    place = torch.tensor([case.position for case in cases])
    row = torch.arange(len(cases))
    for _ in range(max(len(ways[0]) for ways in allowed)):
        with model.edited(edits):
            logits = model.logits(ids)[row, place].float().cpu()
        place = place + 1
        ids[row, place] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    legal = 0
    for i, (case, ways) in enumerate(zip(cases, allowed, strict=True)):
        written = ids[i, case.position + 1 : case.position + 1 + len(ways[0])].tolist()
        legal += tuple(truth.world.text_of(written)) in ways
    return legal / len(cases)
