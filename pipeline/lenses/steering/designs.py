"""From two sets of texts, words, features or a classifier to a designed plan of a run, with what it
should do beside what it does.

1. An aim is a list of gradients (steering/design.py). Texts: log-likelihood of the topical less
   that of the others, and the words that tell them apart; words: their expected share of sampled
   tokens; features (a trace's supernode is several): their top tokens; a classifier: its margin.
2. Gradients are brought to one scale, the best single feature's effect per √KL, and added.
3. Features are selected and weighted with a sketch (lens `output-sketch`), from all layers
   that are sketched, from some, from one flow, or one dense vector instead; then the strength is
   calibrated with real passes.
4. Measured on other text than designed on: KL and loss on held-out text, expected words of 100,
   selectivity on texts that were kept back (every third).
5. The curve along the flow of the strongest feature: how well each member reads, and how much it
   would write.

Cost: two to three backward passes and some ten forward passes on short texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from data.concepts.prompts import read_prompts
from featureflow.errors import Problem, UserError
from featureflow.sites import FeatureId, Site, parse_feature
from pipeline.flow.validation import held_out_contexts
from pipeline.lenses.steering.contrast import LEAST_TEXTS, telling_tokens
from pipeline.run import Run
from steering.arms import Flow, Scales, along_vectors
from steering.design import (
    Candidates,
    Gradient,
    Sketch,
    as_plan,
    candidates_of,
    dense,
    gradient_of,
    likelihood,
    margin,
    select,
    words,
)
from steering.dose import NeutralText, measure, steered_log_probs
from steering.exports import added_vectors
from steering.features import rank_features, read_texts
from steering.generation import Sampling
from steering.plan import Plan
from steering.sequences import Batch, device_of, encoded, padded
from steering.teacher_forced import expected_share, lexicon_tokens, selectivity

WRITES_AT, LEAST_WORDS = 0.3, 1.0
"""A plan that says less than one of its words in 100 at this dose reads, hardly writes."""
N_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class DesignOptions:
    """How many features, from where: `layers` first to last, `along` the flow of a feature, or one
    `dense` vector at the best of these layers."""

    k: int = 8
    layers: tuple[int, int] | None = None
    along: str | None = None
    dense: bool = False
    dose: float = 0.15


@dataclass(frozen=True, kw_only=True, eq=False)
class Aim:
    """What a plan is to bring about. `tokens`: the words that are counted; `topical` and `other`
    were kept back from the design."""

    name: str
    gradients: tuple[Gradient, ...]
    tokens: tuple[int, ...] = ()
    word_gradient: Gradient | None = None
    topical: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    reads: dict[FeatureId, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A calibrated plan; `measured` with rows what, predicted, measured; `curve` along the flow of
    the strongest feature."""

    plan: Plan
    measured: pd.DataFrame
    curve: pd.DataFrame
    words_at_limit: float | None

    @property
    def hardly_writes(self) -> bool:
        return self.words_at_limit is not None and self.words_at_limit < LEAST_WORDS


def aim_of_texts(run: Run, sketch: Sketch, topical: Sequence[str], other: Sequence[str]) -> Aim:
    """Towards the first texts and away from the others. Raises UserError."""
    _check_texts(topical, other)
    model = run.exact_model
    parts = [[t for i, t in enumerate(each) if i % 3 < 2] for each in (topical, other)]
    kept = [[t for i, t in enumerate(each) if i % 3 == 2] for each in (topical, other)]
    states = read_texts(run.steering.model, run.steering.saes, [*parts[0], *parts[1]])
    is_topic = [True] * len(parts[0]) + [False] * len(parts[1])
    readers = rank_features(states, is_topic, n_best=10_000)
    if not readers:
        raise UserError(
            "no feature is active on a tenth of the topical texts", fix="give longer texts, or more"
        )
    sites = sketch.sites
    likelihoods = [gradient_of(model, _batch(run, texts), sites, likelihood()) for texts in parts]
    gradients = [{site: likelihoods[0][site] - likelihoods[1][site] for site in sites}]
    tokens = telling_tokens(model.tokenizer, *parts)
    word_gradient = _word_gradient(run, sites, tokens) if tokens else None
    if word_gradient:
        gradients.append(word_gradient)
    return Aim(
        name="texts",
        gradients=tuple(gradients),
        tokens=tokens,
        word_gradient=word_gradient,
        topical=tuple(kept[0]),
        other=tuple(kept[1]),
        reads={each.feature: each.auroc for each in readers},
    )


def aim_of_words(run: Run, sketch: Sketch, listed: Sequence[str]) -> Aim:
    """Towards these words. Raises UserError when none of them is one token."""
    tokens = tuple(lexicon_tokens(run.model, listed))
    if not tokens:
        raise UserError(
            "none of these words is one token of the model",
            found=", ".join(listed),
            fix="give shorter or commoner words",
        )
    return _aim_of_tokens(run, sketch, "words", tokens)


def aim_of_features(run: Run, sketch: Sketch, features: Sequence[str]) -> Aim:
    """Towards the top tokens of features: of one, or of a supernode. Raises UserError."""
    parsed = [parse_feature(feature) for feature in features]
    for feature in parsed:
        run.graph.number(feature)
    if modules := [str(f) for f in parsed if f.site not in run.steering.saes]:
        raise UserError("features of the residual stream only", found=", ".join(modules))
    profiles = run.steering.profiles(parsed, 16384)
    tokens = tuple(sorted({token for p in profiles.values() for token in p.top_tokens}))
    if not tokens:
        raise UserError(
            f"no top tokens are known of {', '.join(features)}",
            expected="a feature that is active on some words more than on others",
            fix="design from texts or words instead",
        )
    return _aim_of_tokens(run, sketch, ", ".join(features), tokens)


def aim_of_classifier(
    run: Run, sketch: Sketch, site: Site, weight: Float[Tensor, "d_model"]
) -> Aim:
    """Towards a linear classifier's margin at a site."""
    neutral = _neutral(run)
    gradient = gradient_of(run.exact_model, neutral, sketch.sites, margin(site, weight))
    return Aim(name=f"classifier at {site.short}", gradients=(gradient,))


def design(run: Run, sketch: Sketch, aim: Aim, options: DesignOptions) -> Made:
    """A plan for an aim, calibrated to the dose and measured. Raises UserError."""
    plan, strongest = designed_plan(run, sketch, aim, options)
    measured, at_limit = _measured(run, aim, plan, sketch)
    curve = _curve(run, aim, sketch, strongest, options.dose)
    return Made(plan=plan, measured=measured, curve=curve, words_at_limit=at_limit)


def designed_plan(
    run: Run, sketch: Sketch, aim: Aim, options: DesignOptions
) -> tuple[Plan, FeatureId | None]:
    """(the calibrated plan, the feature with the largest share of its effect). Raises
    UserError."""
    steering = run.steering
    gradient = _together(run, aim, sketch)
    flow = None if options.along is None else _whole_flow(run, options.along)
    sites = _allowed_sites(sketch, options)
    strongest = None
    if options.dense:
        found = {site: dense(gradient, sketch, site) for site in sites}
        best = max(sites, key=lambda site: found[site][1])
        plan = along_vectors(
            {best: found[best][0]}, Scales(norms=steering.norms, activations={}), name="dense"
        )
    else:
        members = None if flow is None else {step for step, _ in flow.steps}
        candidates = candidates_of(
            gradient,
            sketch,
            steering.saes,
            allowed=lambda f: f.site in sites and (members is None or f in members),
        )
        designed = select(candidates, options.k)
        plan = as_plan(designed, steering.norms, dose=options.dose)
        strongest = _strongest(candidates, designed.features, designed.pushes)
    plan = replace(plan, name=f"{aim.name}, designed", note=f"designed for {aim.name}")
    return steering.calibrated(steering.signed(plan), options.dose), strongest


def lines_of(made: Made) -> list[str]:
    """For the command line."""
    lines = [f"{node.at:>10}  weight {node.weight:.3f}" for node in made.plan.nodes]
    lines.append(f"{'':36} predicted  measured")
    lines += [
        f"{row.what:<36} {row.predicted:9.3f} {row.measured:9.3f}"
        for row in made.measured.itertuples()
    ]
    if len(made.curve):
        lines.append("along the flow of the strongest feature: reads, would write of 100")
        lines += [
            f"{row.feature:>10}  {row.reads:.2f}  {row.writes:+.3f}"
            for row in made.curve.itertuples()
        ]
    if made.hardly_writes:
        lines.append(
            f"reads, hardly writes: {made.words_at_limit:.2f} of its words in 100 at "
            f"{WRITES_AT:g} nats; featureflow steer remove is the stronger use of such a feature"
        )
    return lines


def _check_texts(topical: Sequence[str], other: Sequence[str]) -> None:
    problems = [
        Problem(
            what="too few texts", where=where, expected=f"{LEAST_TEXTS} or more", found=str(len(s))
        )
        for where, s in (("topical", topical), ("other", other))
        if len(s) < LEAST_TEXTS
    ]
    if both := sorted(set(topical) & set(other)):
        problems.append(
            Problem(what="texts in both sets", found=f"{len(both)}, such as {both[0][:60]!r}")
        )
    if problems:
        raise UserError("nothing can be designed from these texts", problems=tuple(problems))


def _aim_of_tokens(run: Run, sketch: Sketch, name: str, tokens: tuple[int, ...]) -> Aim:
    gradient = _word_gradient(run, sketch.sites, tokens)
    return Aim(name=name, gradients=(gradient,), tokens=tokens, word_gradient=gradient)


def _word_gradient(run: Run, sites: Sequence[Site], tokens: Sequence[int]) -> Gradient:
    return gradient_of(run.exact_model, _neutral(run), sites, words(tokens))


def _neutral(run: Run) -> Batch:
    return _batch(run, read_prompts().neutral_texts, n_tokens=32)


def _batch(run: Run, texts: Sequence[str], *, n_tokens: int = N_TOKENS) -> Batch:
    model = run.exact_model
    return padded([encoded(model, t)[:n_tokens] for t in texts], device=device_of(model))


def _together(run: Run, aim: Aim, sketch: Sketch) -> Gradient:
    """The gradients on one scale: each over the best single feature's effect per √KL."""
    best = [
        float(candidates_of(g, sketch, run.steering.saes, n=1).per_root_kl[0])
        for g in aim.gradients
    ]
    return {
        site: sum((g[site] / b for g, b in zip(aim.gradients, best, strict=True)), torch.zeros(()))
        for site in sketch.sites
    }


def _allowed_sites(sketch: Sketch, options: DesignOptions) -> list[Site]:
    first, last = options.layers or (0, 10_000)
    sites = [site for site in sketch.sites if first <= site.layer <= last]
    if not sites:
        raise UserError(
            "no layer that is sketched lies there",
            expected=f"layers of {sketch.sites[0].layer} to {sketch.sites[-1].layer}",
            found=f"{first} to {last}",
        )
    return sites


def _whole_flow(run: Run, feature: str) -> Flow:
    seed = parse_feature(feature)
    run.graph.number(seed)
    return run.steering.flow(seed, n_before=10_000, n_after=10_000)


def _strongest(
    candidates: Candidates, features: Sequence[FeatureId], pushes: Sequence[float]
) -> FeatureId:
    effect = dict(zip(candidates.features, candidates.effect, strict=True))
    parts = [effect[f] * push for f, push in zip(features, pushes, strict=True)]
    return features[int(np.argmax(parts))]


def _measured(run: Run, aim: Aim, plan: Plan, sketch: Sketch) -> tuple[pd.DataFrame, float | None]:
    """What the sketch and the gradients say of the calibrated plan, beside what it does."""
    model, saes = run.steering.model, run.steering.saes
    pushed = added_vectors(plan, saes)
    predicted_kl = sketch.kl(pushed)
    held = held_out_contexts(model, run.store, n_contexts=6).ids[:, :64]
    text = NeutralText.prepare(model, [tuple(map(int, row)) for row in held], n_tokens=64)
    dose = measure(model, saes, plan, text, monitor=False)
    rows = [
        ("KL, neutral text (calibrated)", predicted_kl, float(plan.dose or 0)),
        ("KL, held-out text", predicted_kl, dose.kl),
        ("rise of the loss, held-out text", np.nan, dose.delta_ce),
    ]
    at_limit = None
    if aim.tokens and aim.word_gradient is not None:
        before = 100 * float(expected_share(text.log_probs, aim.tokens, Sampling()).mean())
        gain = 100 * _effect(aim.word_gradient, pushed)
        rows.append(("its words of 100, unsteered", np.nan, before))
        rows.append(("its words of 100, steered", before + gain, _said(run, aim, plan, text)))
        limit = plan.with_strength(plan.strength * (WRITES_AT / (plan.dose or WRITES_AT)) ** 0.5)
        at_limit = _said(run, aim, limit, text)
    if aim.topical and aim.other:
        found = selectivity(model, saes, plan, aim.topical, aim.other)
        predicted = _effect(aim.gradients[0], pushed)
        rows.append(("nats a token, topical less other", predicted, found.score))
    return pd.DataFrame(rows, columns=["what", "predicted", "measured"]), at_limit


def _said(run: Run, aim: Aim, plan: Plan, text: NeutralText) -> float:
    steered = steered_log_probs(run.steering.model, run.steering.saes, plan, text)
    return 100 * float(expected_share(steered, aim.tokens, Sampling()).mean())


def _effect(gradient: Gradient, pushed: Mapping[Site, Tensor]) -> float:
    return float(sum(gradient[site] @ vector for site, vector in pushed.items()))


def _curve(run: Run, aim: Aim, sketch: Sketch, seed: FeatureId | None, dose: float) -> pd.DataFrame:
    """Along the flow: how well each member reads (AUROC of the texts, else the share of its
    activation on its top tokens), and how many words of 100 it would write, to first order."""
    columns = ["feature", "reads", "writes"]
    if seed is None or aim.word_gradient is None:
        return pd.DataFrame(columns=columns)
    steps = [step for step, _ in _whole_flow(run, str(seed)).steps]
    purity = {f: p.purity for f, p in run.steering.profiles(steps, 8192).items()}
    rows = []
    for step in steps:
        if step.site in sketch.sites:
            unit = run.saes[step.site].W_dec[step.latent].float()
            unit = unit / unit.norm()
            cost = float(sketch.cost(step.site, unit[None])[0])
            effect = float(aim.word_gradient[step.site] @ unit)
            writes = 100 * effect * (2 * dose) ** 0.5 / max(cost, 1e-12)
            reads = purity[step] if aim.reads is None else aim.reads.get(step, 0.5)
            rows.append((str(step), reads, writes))
    return pd.DataFrame(rows, columns=columns)
