"""Which features to steer with, found in the flow graph, the store and the model's own output.

1. Candidates: living residual features of middle layers that flow through several layers and are
   active neither too seldom nor on more than `max_density` of the tokens.
2. Input side: their top tokens and purity, from activations in the store. Those whose top tokens
   are mostly content words come before all others, those with a label that passed its test before
   those without, and then those whose direction at the end of the flow points at their top tokens'
   unembeddings (`reach`, free of forward passes).
3. Output side: what steering along the flow makes the model write on neutral text; ranked by the
   share of the KL that moves probability to their top tokens.
4. Screening (pipeline/lenses/steering/screening.py): the best dozen, no two of one chain or with
   the same tokens, continue development prompts at the middle dose; those that write their top
   tokens and stay coherent are taken.
5. Each gets its flow (the chain around it, without steps that were never active), units, and a
   random control: another feature of its site with like density and a flow over the same layers.

Features named in the config skip 1–4. When too few candidates meet the conditions, these are
relaxed, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from data.concepts.prompts import read_prompts
from featureflow.errors import Command, UserError
from featureflow.sites import FeatureId, parse_feature, parse_site
from pipeline.flow.graph import FlowGraph
from pipeline.lenses.steering.screening import Screening, ScreeningOptions, screened
from pipeline.steering_run import Steering, is_content_word
from steering.arms import Flow, Scales, along_flow
from steering.dose import NeutralText
from steering.features import Profile
from steering.reading import Target
from steering.teacher_forced import OutputScore, output_score

_N_SITES = 5
_PER_SITE = 2048
_N_SCORED = 72
_N_SCREENED = 16
_SCORING_STRENGTH = 0.25
_N_NEUTRAL = 4
_LEAST_PURITY = 0.3
_CONTENT_SHARE = 0.6
_N_ROWS_ALONG = 8192


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """See `pipeline.stages.steer.Config`, whose fields of the same names explain them. `has_label`:
    whether a feature has a label that passed its test."""

    n_features: int
    features: tuple[str, ...]
    max_density: float
    min_persistence: int
    n_before: int
    n_after: int
    n_rows: int
    seed: int
    screening: ScreeningOptions | None = None
    has_label: Callable[[FeatureId], bool] = lambda feature: True


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A feature to steer with, its flow and random control, units, and why it was taken."""

    flow: Flow
    control: Flow
    scales: Scales
    target: Target
    profile: Profile
    score: OutputScore
    screening: Screening | None
    n_silent_steps: int


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A feature on its way to being chosen."""

    profile: Profile
    score: OutputScore
    screening: Screening | None = None

    @property
    def feature(self) -> FeatureId:
        return self.profile.feature


def choose_features(
    steering: Steering, options: SelectionOptions
) -> tuple[list[Chosen], list[str]]:
    """The features to steer with, best first, and remarks on what had to be relaxed. Raises
    UserError if none can."""
    remarks: list[str] = []
    if options.features:
        seeds = [_checked(steering, name) for name in options.features]
        profiles = steering.profiles(seeds, options.n_rows)
        taken = _scored(steering, [profiles[seed] for seed in seeds], options)
    else:
        ranked = _ranked(steering, options, remarks)
        taken = _screened(
            steering, _different(steering.graph, ranked, _n_screened(options)), options
        )
    if not taken:
        raise UserError(
            "no feature can be steered with",
            expected="a living residual feature that is active on words of the text",
            fix="name features: --steer.features '[\"L12/402\"]'",
        )
    if len(taken) < options.n_features and not options.features:
        remarks.append(
            f"only {len(taken)} of {options.n_features} features found that differ in tokens and "
            "chain"
        )
    flows = [_flow(steering, each.feature, options) for each in taken]
    along = [feature for flow in flows for feature, _ in flow.steps]
    profiles = steering.profiles(along, min(options.n_rows, _N_ROWS_ALONG))
    others = {each.feature for each in taken}
    chosen = [
        _chosen(steering, each, flow, profiles, others, options.seed)
        for each, flow in zip(taken, flows, strict=True)
    ]
    return chosen, remarks


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


def reach(
    steering: Steering, profiles: Sequence[Profile], options: SelectionOptions
) -> dict[FeatureId, float]:
    """How far the direction at the end of each feature's flow points at its top tokens: their mean
    logit for it, in standard deviations over the vocabulary. No forward pass; it misses what later
    blocks would do."""
    unembedding, gain = (tensor.float() for tensor in steering.model.unembedding())
    centred = unembedding - unembedding.mean(0)
    second_moment = centred.T @ centred / len(centred)
    found = {}
    for profile in profiles:
        end, _ = _flow(steering, profile.feature, replace(options, n_before=0)).steps[-1]
        direction = steering.saes[end.site].W_dec[end.latent].float() * gain
        spread = (direction @ second_moment @ direction).clamp(min=1e-12).sqrt()
        found[profile.feature] = float(
            (centred[list(profile.top_tokens)] @ direction).mean() / spread
        )
    return found


def _checked(steering: Steering, name: str) -> FeatureId:
    feature = parse_feature(name)
    steering.graph.number(feature)
    if feature.site not in steering.saes:
        raise UserError(
            "there is no dictionary for it",
            where=name,
            expected=", ".join(s.short for s in steering.saes),
        )
    return feature


def _flow(steering: Steering, seed: FeatureId, options: SelectionOptions) -> Flow:
    return steering.flow(seed, n_before=options.n_before, n_after=options.n_after)


def _ranked(steering: Steering, options: SelectionOptions, remarks: list[str]) -> list[_Candidate]:
    candidates = candidate_features(steering.graph.nodes, options, remarks)
    profiles = steering.profiles(candidates, options.n_rows).values()
    usable = [p for p in profiles if p.top_tokens and 0 < p.density <= options.max_density]
    words = {p.feature: _content_share(steering, p.top_tokens) for p in usable}
    reaches = reach(steering, usable, options)

    def rank_of(profile: Profile) -> tuple[bool, bool, bool, float, str]:
        return (
            words[profile.feature] < _CONTENT_SHARE,
            profile.purity < _LEAST_PURITY,
            not options.has_label(profile.feature),
            -reaches[profile.feature],
            str(profile.feature),
        )

    scored = _scored(steering, sorted(usable, key=rank_of)[:_N_SCORED], options)
    return sorted(scored, key=lambda c: (*rank_of(c.profile)[:3], -c.score.on_target_share))


def _content_share(steering: Steering, tokens: Sequence[int]) -> float:
    """The share of tokens that are content words. A reader can tell whether a text turned to
    tomatoes, hardly whether it turned to ‘its’."""
    texts = [steering.model.tokenizer.decode([token]) for token in tokens]
    return sum(map(is_content_word, texts)) / max(len(texts), 1)


def _scored(
    steering: Steering, profiles: Sequence[Profile], options: SelectionOptions
) -> list[_Candidate]:
    scales = Scales(norms=steering.norms, activations={})
    neutral = NeutralText.prepare(
        steering.model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32
    )
    found = []
    for profile in profiles:
        flow = _living(steering, _flow(steering, profile.feature, options))
        plan = along_flow(flow, scales, strength=_SCORING_STRENGTH)
        score = output_score(steering.model, steering.saes, plan, profile.top_tokens, neutral)
        found.append(_Candidate(profile=profile, score=score))
    return found


def _living(steering: Steering, flow: Flow) -> Flow:
    steps = (s for s in flow.steps if s[0] == flow.seed or steering.graph.node(s[0])["alive"])
    return replace(flow, steps=tuple(steps))


def _different(graph: FlowGraph, ranked: Sequence[_Candidate], n: int) -> list[_Candidate]:
    """The first `n` that share neither a chain nor a quarter of their tokens with one before
    them."""
    taken: list[_Candidate] = []
    used: set[FeatureId] = set()
    for candidate in ranked:
        own = set(candidate.profile.top_tokens)
        chain = {step.feature for step in graph.chain(candidate.feature)}
        others = [set(each.profile.top_tokens) for each in taken]
        alike = any(len(own & other) > 0.25 * min(len(own), len(other)) for other in others)
        if len(taken) < n and not alike and not chain & used:
            taken.append(candidate)
            used |= chain
    return taken


def _n_screened(options: SelectionOptions) -> int:
    """Without a screening, no more than are wanted."""
    return options.n_features if options.screening is None else max(_N_SCREENED, options.n_features)


def _screened(
    steering: Steering, candidates: Sequence[_Candidate], options: SelectionOptions
) -> list[_Candidate]:
    """The best of the screening, best first."""
    if options.screening is None or not candidates:
        return list(candidates)
    asked = [
        (_living(steering, _flow(steering, c.feature, options)), frozenset(c.profile.top_tokens))
        for c in candidates
    ]
    results = screened(steering, asked, options.screening)
    ranked = sorted(
        zip(candidates, results, strict=True), key=lambda pair: pair[1].merit, reverse=True
    )
    return [
        replace(candidate, screening=result) for candidate, result in ranked[: options.n_features]
    ]


def _chosen(
    steering: Steering,
    candidate: _Candidate,
    flow: Flow,
    profiles: Mapping[FeatureId, Profile],
    others: set[FeatureId],
    seed: int,
) -> Chosen:
    profile = candidate.profile
    active = tuple(s for s in flow.steps if profiles[s[0]].strong > 0 or s[0] == flow.seed)
    strong = {feature: profiles[feature].strong or 1.0 for feature, _ in active}
    kept = replace(flow, steps=active)
    return Chosen(
        flow=kept,
        control=steering.random_flow(kept, seed=seed, excluded=others),
        scales=Scales(norms=steering.norms, activations=strong),
        target=Target(
            feature=flow.seed, scale=profile.strong or 1.0, top_tokens=frozenset(profile.top_tokens)
        ),
        profile=profile,
        score=candidate.score,
        screening=candidate.screening,
        n_silent_steps=len(flow.steps) - len(active),
    )
