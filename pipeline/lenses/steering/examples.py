"""Three examples drawn by a seed: two designed pushes towards topics and one removal, whole
continuations beside unsteered ones from the same random numbers.

1. Two of the bundled topics are drawn; a plan is designed for the words of each
   (pipeline/lenses/steering/designs.py). Its dose is the largest of `DOSES` that leaves the text
   coherent, tried on other prompts than those shown: the coherent share lies at most 10 points
   below that of unsteered text.
2. One living feature is drawn whose flow reaches some layers on, and removed along it. Its prompts
   are beginnings of held-out text up to a token on which it is active.
3. Prompts are continued with and without the plan. Counted over all of them: words of 100 that are
   the topic's (or the feature's top tokens), and the share that stays coherent.

What cannot be made (no topic's words are tokens of the model, no flow is long enough) is a remark.
Cost: a small sketch, one backward pass and four short passes a plan; 16 samples for each of
three doses a push; the examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from data.concepts.prompts import read_prompts
from data.concepts.topics import read_topics
from featureflow.errors import UserError
from featureflow.sites import FeatureId
from pipeline.lenses.steering.designs import DesignOptions, aim_of_words, designed_plan
from pipeline.lenses.steering.removal_trial import Held, flow_of
from pipeline.run import Run
from steering.design import Sketch, sketch_of
from steering.dose import NeutralText
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, Target, is_coherent, read_back

DOSES = (0.05, 0.1, 0.15, 0.2, 0.3)
TOLERATED = 0.1
"""How far the coherent share may lie below that of unsteered text."""
N_PUSHES, N_SHOWN = 2, 2
N_TRIED = 1
_N_TEXTS, _N_TOKENS, _N_SAMPLES = 12, 24, 8
_DEPTH, _REACH, _PROMPT_TOKENS, _MOST_READ = 1 / 3, 6, 24, 8


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How text is drawn, and what counts as coherent at its length."""

    sampling: Sampling
    limits: CoherenceLimits
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What an example is of. `tried`: what each dose did that was tried."""

    title: str
    plan: Plan
    target: Target
    prompts: Sequence[str]
    tried: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Example:
    """A plan, what it is about, and its continuations. Shares are over all `n` prompts."""

    title: str
    plan: Plan
    n: int
    words: tuple[float, float]
    coherent: tuple[float, float]
    samples: tuple[dict[str, str], ...]
    tried: tuple[dict[str, Any], ...]

    def as_record(self) -> dict[str, Any]:
        """For examples.json and the page; pairs are (unsteered, steered)."""
        return {
            "title": self.title,
            "plan": self.plan.name,
            "dose": self.plan.dose,
            "n": self.n,
            "words_of_100": self.words,
            "coherent": self.coherent,
            "samples": list(self.samples),
            "doses_tried": list(self.tried),
        }


def make_examples(
    run: Run, prompts: Sequence[str], trial_prompts: Sequence[str], writing: Writing
) -> tuple[list[Example], list[str]]:
    """(examples, remarks). Doses are chosen on `trial_prompts`."""
    sketch = _small_sketch(run, writing.seed)
    makers: list[Callable[[], _Made]] = [
        *(
            partial(_push, run, sketch, topic, prompts, trial_prompts, writing)
            for topic in _topics(writing.seed)
        ),
        partial(_removal, run, len(prompts), writing.seed),
    ]
    found, remarks = [], []
    for make in makers:
        try:
            found.append(_example(run, make(), writing))
        except UserError as error:
            remarks.append(f"no example: {error.what}")
    return found, remarks


def largest_coherent(tried_at: Callable[[float], bool]) -> float:
    """The largest dose at which text stays coherent, the smallest where none does; larger doses
    are taken to do more harm, so that three are tried."""
    low, high = 0, len(DOSES)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if tried_at(DOSES[middle]) else (low, middle)
    return DOSES[max(low - 1, 0)]


def _topics(seed: int) -> list[str]:
    names = sorted(read_topics())
    return [names[k] for k in np.random.default_rng(seed).permutation(len(names))[:N_PUSHES]]


def _small_sketch(run: Run, seed: int) -> Sketch:
    model = run.exact_model
    first = _DEPTH * (model.n_layers - 1)
    texts = read_prompts().neutral_texts[:_N_TEXTS]
    batch = NeutralText.prepare(model, texts, n_tokens=_N_TOKENS).batch
    sites = [site for site in run.steering.saes if site.layer >= first]
    return sketch_of(model, batch, sites, n_samples=_N_SAMPLES, seed=seed)


def _push(
    run: Run,
    sketch: Sketch,
    topic: str,
    prompts: Sequence[str],
    trial_prompts: Sequence[str],
    writing: Writing,
) -> _Made:
    aim = aim_of_words(run, sketch, sorted(read_topics()[topic].lexicon))
    first, strongest = designed_plan(run, sketch, aim, DesignOptions(dose=DOSES[len(DOSES) // 2]))
    if strongest is None:
        raise UserError(f"nothing was designed for {topic}")
    target = Target(feature=strongest, scale=1.0, top_tokens=frozenset(aim.tokens))
    other = replace(writing, seed=writing.seed + 4)
    plans: dict[float, Plan] = {}
    tried: list[dict[str, Any]] = []

    def stays_coherent(dose: float) -> bool:
        plans[dose] = run.steering.calibrated(first, dose)
        sides = _written(run, trial_prompts, plans[dose], n_samples=N_TRIED, writing=other)
        words, coherent = _judged(run, sides, target, other)
        tried.append({"dose": dose, "words_of_100": words, "coherent": coherent})
        return coherent[1] >= coherent[0] - TOLERATED

    dose = largest_coherent(stays_coherent)
    return _Made(
        title=f"push towards {topic}",
        plan=plans[dose],
        target=target,
        prompts=prompts,
        tried=tuple(sorted(tried, key=lambda each: each["dose"])),
    )


def _removal(run: Run, n_prompts: int, seed: int) -> _Made:
    """The first of a few random features that has top tokens and held-out text to begin with."""
    held = Held(run=run)
    for feature in islice(_with_long_flows(run, seed), _MOST_READ):
        prompts = _beginnings(run, held, feature, n_prompts)
        top = run.steering.profiles([feature], 8192)[feature].top_tokens
        if prompts and top:
            target = Target(feature=feature, scale=1.0, top_tokens=frozenset(top))
            plan = run.remove(feature)
            return _Made(title=f"removal of {feature}", plan=plan, target=target, prompts=prompts)
    raise UserError("no random feature has a flow that is long enough, and top tokens")


def _with_long_flows(run: Run, seed: int) -> Iterator[FeatureId]:
    """Random living features of the first two thirds whose flow reaches some layers on."""
    last = run.model.n_layers - 1
    sites = {site.short: site for site in run.steering.saes if site.layer <= 2 / 3 * last}
    nodes = run.graph.nodes
    alive = nodes[nodes["site"].isin(list(sites)) & nodes["alive"]]
    for row in np.random.default_rng([seed, 1]).permutation(len(alive)):
        site = sites[str(alive["site"].iloc[row])]
        feature = FeatureId(site, int(alive["latent"].iloc[row]))
        reach = flow_of(run, feature).sites[-1].layer - site.layer
        if reach >= min(_REACH, last - 1 - site.layer):
            yield feature


def _beginnings(run: Run, held: Held, feature: FeatureId, n: int) -> list[str]:
    """Held-out text up to a token on which the feature is active, one a context."""
    active = held.activity(feature.site, [feature.latent])[:, :, 0] > 0
    active[:, :2] = False
    found = []
    for context in np.flatnonzero(active.any(1))[:n]:
        end = int(active[context].argmax()) + 1
        ids = held.contexts.ids[context, max(1, end - _PROMPT_TOKENS) : end]
        found.append(run.model.tokenizer.decode(ids.tolist()))
    return [text for text in found if text.strip()]


def _example(run: Run, made: _Made, writing: Writing) -> Example:
    sides = _written(run, made.prompts, made.plan, n_samples=1, writing=writing)
    words, coherent = _judged(run, sides, made.target, writing)
    shown = np.random.default_rng(writing.seed).permutation(len(made.prompts))[:N_SHOWN]
    return Example(
        title=made.title,
        plan=made.plan,
        n=len(made.prompts),
        words=words,
        coherent=coherent,
        samples=tuple(
            {
                "prompt": made.prompts[place],
                "unsteered": sides[0][place].text,
                "steered": sides[1][place].text,
            }
            for place in sorted(map(int, shown))
        ),
        tried=made.tried,
    )


def _written(
    run: Run, prompts: Sequence[str], plan: Plan, *, n_samples: int, writing: Writing
) -> list[tuple[Sample, ...]]:
    """Unsteered and steered continuations from the same random numbers."""
    made = generate(
        run.steering.model,
        run.steering.saes,
        list(prompts),
        [None, plan],
        n_samples=n_samples,
        seed=writing.seed,
        sampling=writing.sampling,
        batch_size=2 * len(prompts) * n_samples,
    )
    return [made.of_plan(number) for number in (0, 1)]


def _judged(
    run: Run, sides: Sequence[Sequence[Sample]], target: Target, writing: Writing
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(words of 100, coherent share), each unsteered and steered."""
    steering, limits = run.steering, writing.limits
    read = [read_back(steering.model, steering.saes, side, [target]) for side in sides]
    return (
        _pair([float(np.mean([r.top_tokens[0] for r in side])) for side in read]),
        _pair([float(np.mean([is_coherent(r, limits) for r in side])) for side in read]),
    )


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]
