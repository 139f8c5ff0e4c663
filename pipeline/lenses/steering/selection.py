"""Which features to steer with, found in the flow graph, the store and the model's own output.

1. Candidates: living residual features of middle layers that flow through several layers and fire
   neither too seldom nor on more than `max_density` of the tokens.
2. Input side: their own tokens and purity, from activations in the store. Those whose own tokens
   are mostly content words come before all others, those with a label that passed its test before
   those without, and then those whose direction at the end of the flow points at their own tokens'
   unembeddings (`reach`, free of forward passes).
3. Output side: what steering along the flow makes the model write on neutral text; ranked by the
   share of the KL that moves probability to their own tokens.
4. Audition (pipeline/lenses/steering/screening.py): the best dozen, no two of one chain or with the
   same tokens, continue development prompts at the middle dose; those that write their own words
   and stay coherent are taken.
5. Each gets its flow (the chain around it, without steps that never fired), units, and a placebo:
   another feature of its site with like density and a flow over the same layers.

Features named in the config skip 1–4. When too few candidates meet the conditions, these are
relaxed, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from data.concepts.prompts import read_prompts
from data.model.language_model import LanguageModel
from data.store import ActivationStore
from featureflow.errors import Command, UserError
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.flow.graph import FlowGraph
from pipeline.lenses.steering.screening import Audition, AuditionOptions, auditioned
from sae import Sae
from steering.arms import Flow, Scales, flow_additive
from steering.dose import NeutralText
from steering.profile import OutputScore, Profile, output_scores, profile_features
from steering.reading import Target

_N_SITES = 5
_PER_SITE = 2048
_N_SCORED = 72
_N_AUDITIONED = 16
_SCORING_STRENGTH = 0.25
_N_NEUTRAL = 4
_LEAST_PURITY = 0.3
_CONTENT_SHARE = 0.6
_N_PLACEBO_DRAWS = 16
_N_ROWS_ALONG = 8192


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """See `pipeline.stages.steer.Config`, whose fields of the same names explain them."""

    n_features: int
    features: tuple[str, ...]
    max_density: float
    min_persistence: int
    n_before: int
    n_after: int
    n_rows: int
    seed: int
    audition: AuditionOptions | None = None


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A feature to steer with, its flow and placebo, units, and why it was taken."""

    flow: Flow
    placebo: Flow
    scales: Scales
    target: Target
    profile: Profile
    score: OutputScore
    audition: Audition | None
    n_silent_steps: int


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What selection reads."""

    graph: FlowGraph
    store: ActivationStore
    saes: Mapping[Site, Sae]
    model: LanguageModel
    has_label: Callable[[FeatureId], bool] = lambda feature: True

    def blocks(self, site: Site, n_rows: int) -> Iterator[Tensor]:
        """Activations of the first kept training rows, in blocks."""
        rows = self.rows(n_rows)
        for part in np.array_split(rows, max(1, len(rows) // 2048)):
            start, stop = int(part[0]), int(part[-1]) + 1
            yield torch.from_numpy(
                np.ascontiguousarray(self.store.read(site, start, stop)[part - start])
            )

    def rows(self, n_rows: int) -> np.ndarray:
        return self.store.kept_rows("train")[:n_rows]

    def ids(self, n_rows: int) -> np.ndarray:
        return self.store.tokens().id[self.rows(n_rows)].astype(np.int64)

    def profiles(self, features: Sequence[FeatureId], n_rows: int) -> dict[FeatureId, Profile]:
        """Profiles of any features; one reading of the store a site."""
        by_site: dict[Site, list[int]] = {}
        for feature in dict.fromkeys(features):
            by_site.setdefault(feature.site, []).append(feature.latent)
        found = [
            profile
            for site, latents in by_site.items()
            for profile in profile_features(
                self.saes[site], site, self.blocks(site, n_rows), self.ids(n_rows), latents
            )
        ]
        return {profile.feature: profile for profile in found}


def choose_features(sources: Sources, options: SelectionOptions) -> tuple[list[Chosen], list[str]]:
    """The features to steer with, best first, and remarks on what had to be relaxed. Raises
    UserError if none can."""
    remarks: list[str] = []
    if options.features:
        seeds = [_checked(sources, name) for name in options.features]
        profiles = sources.profiles(seeds, options.n_rows)
        ranked = _scored(sources, [profiles[seed] for seed in seeds], options)
    else:
        ranked = _ranked_candidates(sources, options, remarks)
    taken: list[tuple[Profile, OutputScore, Audition | None]]
    if options.features:
        taken = [(profile, score, None) for profile, score in ranked]
    else:
        taken = _auditioned(sources, _different(sources.graph, ranked, _n_heard(options)), options)
    if not taken:
        raise UserError(
            "no feature can be steered with",
            expected="a living residual feature that fires on words of the text",
            fix="name features: --steer.features '[\"L12/402\"]'",
        )
    if len(taken) < options.n_features and not options.features:
        remarks.append(
            f"only {len(taken)} of {options.n_features} features found that differ in tokens and "
            "chain"
        )
    windows = [
        window_of_chain(sources, p.feature, options.n_before, options.n_after) for p, _, _ in taken
    ]
    along = [feature for steps in windows for feature, _ in steps]
    profiles = sources.profiles(along, min(options.n_rows, _N_ROWS_ALONG))
    seeds_taken = {profile.feature for profile, _, _ in taken}
    chosen = [
        _with_flow(sources, profile, score, audition, steps, profiles, options, seeds_taken)
        for (profile, score, audition), steps in zip(taken, windows, strict=True)
    ]
    return chosen, remarks


def _checked(sources: Sources, name: str) -> FeatureId:
    feature = parse_feature(name)
    sources.graph.number(feature)
    if feature.site not in sources.saes:
        raise UserError(
            "there is no dictionary for it",
            where=name,
            expected=", ".join(s.short for s in sources.saes),
        )
    return feature


def _ranked_candidates(
    sources: Sources, options: SelectionOptions, remarks: list[str]
) -> list[tuple[Profile, OutputScore]]:
    candidates = candidate_features(sources.graph.nodes, options, remarks)
    profiles = sources.profiles(candidates, options.n_rows).values()
    usable = [p for p in profiles if p.own_tokens and 0 < p.density <= options.max_density]
    words = {p.feature: _content_share(sources, p.own_tokens) for p in usable}

    reaches = reach(sources, usable, options)

    def rank_of(profile: Profile) -> tuple[bool, bool, bool, float, str]:
        return (
            words[profile.feature] < _CONTENT_SHARE,
            profile.purity < _LEAST_PURITY,
            not sources.has_label(profile.feature),
            -reaches[profile.feature],
            str(profile.feature),
        )

    scored = _scored(sources, sorted(usable, key=rank_of)[:_N_SCORED], options)
    return sorted(scored, key=lambda pair: (*rank_of(pair[0])[:3], -pair[1].on_target_share))


def reach(
    sources: Sources, profiles: Sequence[Profile], options: SelectionOptions
) -> dict[FeatureId, float]:
    """How far the direction at the end of each feature's flow points at its own tokens: their mean
    logit for it, in standard deviations over the vocabulary. No forward pass; it misses what later
    blocks would do."""
    unembedding, gain = (tensor.float() for tensor in sources.model.unembedding())
    centred = unembedding - unembedding.mean(0)
    second_moment = centred.T @ centred / len(centred)
    found = {}
    for profile in profiles:
        end = window_of_chain(sources, profile.feature, 0, options.n_after)[-1][0]
        direction = sources.saes[end.site].W_dec[end.latent].float() * gain
        spread = (direction @ second_moment @ direction).clamp(min=1e-12).sqrt()
        found[profile.feature] = float(
            (centred[list(profile.own_tokens)] @ direction).mean() / spread
        )
    return found


def _content_share(sources: Sources, tokens: Sequence[int]) -> float:
    """The share of tokens that are content words: at least three letters, and no English function
    word. A reader can tell whether a text turned to tomatoes, hardly whether it turned to ‘its’."""
    texts = [sources.model.tokenizer.decode([token]).strip().lower() for token in tokens]
    content = [
        len(text) >= 3 and text.isalpha() and text not in ENGLISH_STOP_WORDS for text in texts
    ]
    return sum(content) / max(len(content), 1)


def candidate_features(
    nodes: pd.DataFrame, options: SelectionOptions, remarks: list[str]
) -> list[FeatureId]:
    """Living residual features of up to five layers from 40 % to 85 % of the depth; relaxed if
    there are too few."""
    residual = nodes[(nodes["kind"] == "resid_post") & nodes["alive"]]
    layers = sorted(residual["layer"].unique())
    if not layers:
        raise UserError(
            "no residual feature is alive",
            where="flow graph",
            fix=Command("train", note="with more steps"),
        )
    low, high = int(0.4 * len(layers)), int(0.85 * len(layers))
    middle = layers[low : max(high, low + 1)]
    spread = [middle[round(k)] for k in np.linspace(0, len(middle) - 1, min(_N_SITES, len(middle)))]
    here = residual[residual["layer"].isin(spread)]
    rare = here["density"].isna() | (here["density"] <= options.max_density)
    lasting = here["persistence"] >= options.min_persistence
    chosen = here[rare & lasting]
    if len(chosen) < 4 * options.n_features:
        remarks.append(
            f"fewer than {4 * options.n_features} features last {options.min_persistence} layers: "
            "any may do"
        )
        chosen = here[rare] if rare.any() else here
    ordered = chosen.sort_values(
        ["persistence", "density", "latent"], ascending=[False, False, True], kind="stable"
    )
    top = ordered.groupby("layer", sort=True).head(_PER_SITE)
    return [FeatureId(parse_site(row.site), int(row.latent)) for row in top.itertuples()]


def _scored(
    sources: Sources, profiles: Sequence[Profile], options: SelectionOptions
) -> list[tuple[Profile, OutputScore]]:
    flows = [_living_flow(sources, profile.feature, options) for profile in profiles]
    norms = {site: _norm(sources, site) for site in {site for flow in flows for site in flow.sites}}
    scales = Scales(norms=norms, activations={})
    neutral = NeutralText.prepare(
        sources.model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32
    )
    plans = [flow_additive(flow, scales, strength=_SCORING_STRENGTH) for flow in flows]
    scores = output_scores(sources.model, sources.saes, profiles, plans, neutral)
    return list(zip(profiles, scores, strict=True))


def _different(
    graph: FlowGraph, ranked: Sequence[tuple[Profile, OutputScore]], n: int
) -> list[tuple[Profile, OutputScore]]:
    """The first `n` that share neither a chain nor a quarter of their tokens with one before
    them."""
    taken: list[tuple[Profile, OutputScore]] = []
    used: set[FeatureId] = set()
    for profile, score in ranked:
        own = set(profile.own_tokens)
        chain = {step.feature for step in graph.chain(profile.feature)}
        alike = any(
            len(own & set(p.own_tokens)) > 0.25 * min(len(own), len(p.own_tokens)) for p, _ in taken
        )
        if len(taken) < n and not alike and not chain & used:
            taken.append((profile, score))
            used |= chain
    return taken


def _n_heard(options: SelectionOptions) -> int:
    """How many are auditioned; without an audition, no more than are wanted."""
    return (
        options.n_features if options.audition is None else max(_N_AUDITIONED, options.n_features)
    )


def _auditioned(
    sources: Sources, pairs: Sequence[tuple[Profile, OutputScore]], options: SelectionOptions
) -> list[tuple[Profile, OutputScore, Audition | None]]:
    """The best of the audition, best first."""
    if options.audition is None or not pairs:
        return [(profile, score, None) for profile, score in pairs]
    flows = [_living_flow(sources, profile.feature, options) for profile, _ in pairs]
    norms = {site: _norm(sources, site) for flow in flows for site in flow.sites}
    candidates = [
        (flow, frozenset(p.own_tokens)) for flow, (p, _) in zip(flows, pairs, strict=True)
    ]
    heard = auditioned(sources.model, sources.saes, norms, candidates, options.audition)
    ranked = sorted(zip(pairs, heard, strict=True), key=lambda item: item[1].merit, reverse=True)
    return [
        (profile, score, audition) for (profile, score), audition in ranked[: options.n_features]
    ]


def _living_flow(sources: Sources, seed: FeatureId, options: SelectionOptions) -> Flow:
    steps = window_of_chain(sources, seed, options.n_before, options.n_after)
    return Flow(
        seed=seed,
        steps=tuple(s for s in steps if s[0] == seed or sources.graph.node(s[0])["alive"]),
    )


def _with_flow(
    sources: Sources,
    profile: Profile,
    score: OutputScore,
    audition: Audition | None,
    steps: Sequence[tuple[FeatureId, float]],
    profiles: Mapping[FeatureId, Profile],
    options: SelectionOptions,
    taken: set[FeatureId],
) -> Chosen:
    seed = profile.feature
    firing = [step for step in steps if profiles[step[0]].strong > 0 or step[0] == seed]
    placebo = _placebo(sources, seed, [f.site for f, _ in firing], taken, options)
    sites = {feature.site for feature, _ in (*firing, *placebo.steps)}
    strong = {feature: profiles[feature].strong or 1.0 for feature, _ in firing}
    return Chosen(
        flow=Flow(seed=seed, steps=tuple(firing)),
        placebo=placebo,
        scales=Scales(norms={site: _norm(sources, site) for site in sites}, activations=strong),
        target=Target(
            feature=seed, scale=profile.strong or 1.0, own_tokens=frozenset(profile.own_tokens)
        ),
        profile=profile,
        score=score,
        audition=audition,
        n_silent_steps=len(steps) - len(firing),
    )


def window_of_chain(
    sources: Sources, seed: FeatureId, n_before: int, n_after: int
) -> list[tuple[FeatureId, float]]:
    """The steps of the chain through `seed`, from `n_before` layers before it to `n_after`
    after."""
    low, high = seed.site.layer - n_before, seed.site.layer + n_after
    return [
        (step.feature, 1.0 if step.cosine is None else step.cosine)
        for step in sources.graph.chain(seed)
        if low <= step.feature.site.layer <= high and step.feature.site in sources.saes
    ]


def _placebo(
    sources: Sources,
    seed: FeatureId,
    sites: Sequence[Site],
    taken: set[FeatureId],
    options: SelectionOptions,
) -> Flow:
    """A random feature of the seed's site with like density; of a few draws, the one whose flow
    covers most sites."""
    generator = np.random.default_rng([options.seed, seed.site.layer, seed.latent])
    nodes = sources.graph.nodes
    here = nodes[(nodes["site"] == seed.site.short) & nodes["alive"]]
    own = float(sources.graph.node(seed)["density"])
    near = here[(here["density"] >= own / 4) & (here["density"] <= own * 4)]
    pool = [
        FeatureId(seed.site, int(latent)) for latent in (near if len(near) > 1 else here)["latent"]
    ]
    free = [feature for feature in pool if feature not in taken and feature != seed] or [seed]
    drawn = [free[i] for i in generator.permutation(len(free))[:_N_PLACEBO_DRAWS]]
    flows = [
        (feature, [step for step in _whole_chain(sources, feature) if step[0].site in sites])
        for feature in drawn
    ]
    feature, steps = max(flows, key=lambda flow: len(flow[1]))
    return Flow(seed=feature, steps=tuple(steps))


def _whole_chain(sources: Sources, feature: FeatureId) -> list[tuple[FeatureId, float]]:
    return window_of_chain(sources, feature, feature.site.layer, 10_000)


def _norm(sources: Sources, site: Site) -> float:
    return sources.store.statistics(site).median_norm
