"""What a push makes the model say, at exactly equal KL: `python -m benchmarks.steering_words
artifacts/laptop`.

1. Per topic: the topic's lexicon is dealt into two halves. Every arm is chosen and weighted with
   one half, on neutral text, and measured with the other half, on other text.
2. Measure: expected topic words of 100 tokens under the sampling rule (temperature 0.8, top-k 512,
   top-p 0.95), teacher-forced on held-out text of two corpora. Nothing is sampled.
3. Equal dose: the strength is sought on a few texts of both corpora, then corrected on all until
   their KL is within 20 % of the dose. The gain is read off at exactly the dose, on each corpus for
   itself (linear in √KL between 0 and the strengths measured on all texts).
4. Arms are sums of directions. `ARMS` says what each one is. All are chosen by one rule, effect per
   √KL (steering/design.py); learned weights may be of either sign, also on the random control.
5. Interval: bootstrap over topics; differences are paired. Nothing is chosen on what is reported.

Cost: about one minute of processor time a topic; the sketch, once, one and a half. Results go on
where they were stopped. `--write docs/steering-words.md` writes the page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from data.concepts.prompts import read_prompts
from data.concepts.topics import contrast_texts, read_topics
from data.text.packaged_texts import iter_packaged_text
from featureflow.sites import FeatureId, Site
from featureflow.statistics import bootstrap_mean
from pipeline.context import RunContext
from pipeline.run import Run
from steering.arms import Flow
from steering.design import (
    Candidates,
    Direction,
    Gradient,
    Objective,
    Sketch,
    candidates_of,
    dense,
    fitted,
    gradient_of,
    learned,
    select,
    shifts_of,
    sketch_of,
    words,
)
from steering.dose import NeutralText, solve_for_dose, steered_log_probs
from steering.features import difference_of_means, read_texts
from steering.generation import Sampling
from steering.plan import Node, Plan
from steering.sequences import Batch
from steering.teacher_forced import expected_share, lexicon_tokens

K, N_BEFORE, N_AFTER, LEAST_STEPS = 8, 3, 8, 3
N_LEARNED_TEXTS, N_LEARNED_TOKENS = 16, 24
CORPORA = ("wiki", "recipes")
N_FEW, NEAR = 4, 0.2
"""Texts of each corpus on which strengths are sought; how near the KL of all texts must be."""
DESIGNED = f"{K} of any layer"
ARMS = {
    "single": "the best feature of any layer",
    "flow": "the flow with the most effect, one constant weight",
    "flow's best member": "the best feature of that flow, alone",
    "copied": "its direction at every layer of the flow",
    "flow, learned": f"the flow with weights learned on {N_LEARNED_TEXTS} texts, real passes",
    "random flow, learned": "a random feature's flow over the same layers, likewise",
    DESIGNED: "the designed plan: selected and weighted over all layers",
    f"{K} of one layer": "the same, of the layer where it promises most",
    f"{K} random, fitted": "the same, out of four random features a layer",
    "difference of means": "topical less other texts, at the layer where it promises most",
    "dense": "the dense vector of the gradient, at the layer where it promises most",
    "logit tilt": "the counted words' own logits raised: an upper mark",
}
FLOWS = ("flow", "flow, learned")
SUPERVISED = ("dense", "logit tilt")
COMPARED = ("single", "copied")
Shifts = dict[Site, Tensor]


def main() -> None:
    """Measure the topics that are not measured yet, then write table and page."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.out or arguments.artifacts / "steering-words"
    folder.mkdir(exist_ok=True, parents=True)
    names = sorted(read_topics())
    drawn = np.random.default_rng(arguments.seed).permutation(len(names))[: arguments.topics]
    missing = [names[k] for k in drawn if not (folder / f"{names[k]}.json").exists()]
    if missing[: arguments.at_most]:
        study = Study(arguments, folder / "sketch.pt")
        for topic in missing[: arguments.at_most]:
            rows = list(study.rows(topic))
            (folder / f"{topic}.json").write_text(json.dumps(rows))
            print(f"{time.strftime('%H:%M:%S')} {topic}", flush=True)
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    table = pd.DataFrame(rows)
    page = page_of(table[table["arm"].isin(ARMS)], arguments)
    print(page)
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")


class Study:
    """A run, its sketch, and the texts that everything is measured on."""

    def __init__(self, arguments: argparse.Namespace, sketch: Path) -> None:
        run = Run.open(arguments.artifacts, context=RunContext(n_threads=arguments.threads))
        self.run, self.arguments, self.steering = run, arguments, run.steering
        self.model = run.steering.model
        self.neutral = _neutral(run, len(read_prompts().neutral_texts), 32)
        self.examples = _neutral(run, N_LEARNED_TEXTS, N_LEARNED_TOKENS)
        self.sketch = self._sketch(sketch)
        self.texts = {name: self._held_out(name) for name in CORPORA}
        rows = [
            tuple(t.batch.ids[k][t.batch.real[k]].tolist())
            for t in self.texts.values()
            for k in range(N_FEW)
        ]
        self.few = NeutralText.prepare(self.model, rows)

    def _sketch(self, path: Path) -> Sketch:
        """Read, or made and written."""
        if path.exists():
            return Sketch(**torch.load(path, weights_only=False))
        first = (self.model.n_layers - 1) / 3
        sites = [site for site in self.steering.saes if site.layer >= first]
        n, seed = self.arguments.samples, self.arguments.seed
        found = sketch_of(self.run.exact_model, self.neutral, sites, n_samples=n, seed=seed)
        torch.save({"sites": found.sites, "rows": found.rows}, path)
        return found

    def _held_out(self, corpus: str) -> NeutralText:
        """The last documents of a packaged corpus: the run's text is taken from the first."""
        documents = [document.text for document in iter_packaged_text(corpus)][-400:]
        places = np.random.default_rng(self.arguments.seed).permutation(len(documents))
        texts = [documents[k][:600] for k in places[: self.arguments.texts]]
        return NeutralText.prepare(self.model, texts, n_tokens=self.arguments.tokens)

    def rows(self, topic: str) -> Iterator[dict[str, Any]]:
        """One row an arm and corpus."""
        started = time.process_time()
        lexicon = sorted(read_topics()[topic].lexicon)
        chosen, measured = (set(lexicon_tokens(self.model, lexicon[half::2])) for half in (0, 1))
        counted = tuple(sorted(measured - chosen))
        objective = words(tuple(sorted(chosen)))
        gradient = gradient_of(self.run.exact_model, self.neutral, self.sketch.sites, objective)
        print(f"  gradient: {time.process_time() - started:.0f} s", flush=True)
        unsteered = {name: changes(t, t.log_probs, counted)[1] for name, t in self.texts.items()}
        for arm, shifts in self.arms(topic, gradient, objective).items():
            start = time.process_time()
            for row in self._of_shifts(shifts, counted, unsteered):
                yield {"topic": topic, "arm": arm, **row}
            print(f"  {arm}: {time.process_time() - start:.0f} s", flush=True)
        for corpus, text in self.texts.items():
            found = tilted(text, counted, self.arguments.dose)
            named = dict(zip(("gain", "kl", "rise"), found, strict=True))
            yield {"topic": topic, "arm": "logit tilt", "corpus": corpus, **named}

    def arms(self, topic: str, gradient: Gradient, objective: Objective) -> dict[str, Shifts]:
        """Of every arm what is added at each site, at the dose that the sketch predicts."""
        saes, sites, sketch = self.steering.saes, self.sketch.sites, self.sketch
        everything = candidates_of(gradient, sketch, saes)
        flow = self._best_flow(everything, gradient)
        members = self._in_norms(step for step, _ in flow.steps)
        others = self._in_norms(self._random_flow(flow))
        best = max(members, key=lambda member: self._promise(gradient, shifts_of([member], [1.0])))
        unit = best[1] / best[1].norm()
        copies = [(site, self.steering.norms[site] * unit) for site, _ in members]
        generator = np.random.default_rng([self.arguments.seed, len(topic)])
        drawn = {
            FeatureId(site, int(latent))
            for site in sites
            for latent in generator.permutation(len(saes[site].W_dec))[:4]
        }

        def selected(allowed: Callable[[FeatureId], bool]) -> tuple[float, Shifts]:
            found = select(candidates_of(gradient, sketch, saes, allowed=allowed), K)
            return found.effect, shifts_of(self._directions(found.features), found.pushes)

        def learn(directions: Sequence[Direction]) -> Shifts:
            start = fitted(gradient, sketch, directions) * self.arguments.dose**0.5
            pushes = learned(
                self.model, self.examples, directions, objective, start, dose=self.arguments.dose
            )
            return shifts_of(directions, pushes)

        one_layer = [selected(lambda f, site=site: f.site == site) for site in sites]  # type: ignore[misc]
        vectors = {site: dense(gradient, sketch, site) for site in sites}
        densest = max(vectors, key=lambda site: vectors[site][1])
        found = {
            "single": shifts_of(self._directions(everything.features[:1]), [1.0]),
            "flow": shifts_of(members, np.ones(len(members))),
            "flow's best member": shifts_of([best], [1.0]),
            "copied": shifts_of(copies, np.ones(len(members))),
            "flow, learned": learn(members),
            "random flow, learned": learn(others),
            DESIGNED: selected(lambda _: True)[1],
            f"{K} of one layer": max(one_layer, key=lambda each: each[0])[1],
            f"{K} random, fitted": selected(drawn.__contains__)[1],
            "difference of means": self._means(topic, gradient),
            "dense": {densest: vectors[densest][0]},
        }
        return {name: self._at_dose(shifts) for name, shifts in found.items()}

    def _directions(self, features: Iterable[FeatureId]) -> list[Direction]:
        rows = ((f.site, self.steering.saes[f.site].W_dec[f.latent].float()) for f in features)
        return [(site, row / row.norm()) for site, row in rows]

    def _in_norms(self, features: Iterable[FeatureId]) -> list[Direction]:
        """In median norms of their sites."""
        norms = self.steering.norms
        return [(site, norms[site] * unit) for site, unit in self._directions(features)]

    def _promise(self, gradient: Gradient, shifts: Shifts) -> float:
        """Effect per √KL, to first order."""
        effect = sum(float(gradient[site] @ shift) for site, shift in shifts.items())
        return effect / max(self.sketch.kl(shifts), 1e-12) ** 0.5

    def _best_flow(self, candidates: Candidates, gradient: Gradient) -> Flow:
        """Of the flows through the best features, with three steps or more, the one that promises
        most for the dose with equal weights."""
        found: dict[tuple[FeatureId, ...], tuple[float, Flow]] = {}
        for feature in candidates.features:
            whole = self.steering.flow(feature, n_before=N_BEFORE, n_after=N_AFTER)
            steps = tuple(step for step in whole.steps if step[0].site in self.sketch.sites)
            key = tuple(step for step, _ in steps)
            if len(steps) >= LEAST_STEPS and key not in found:
                shifts = shifts_of(self._in_norms(key), np.ones(len(key)))
                promise = self._promise(gradient, shifts)
                found[key] = promise, Flow(seed=feature, steps=steps)
        return max(found.values(), key=lambda each: each[0])[1]

    def _random_flow(self, flow: Flow) -> list[FeatureId]:
        """A random control; where its flow does not reach, random features, so that it has as many
        weights."""
        excluded = [step for step, _ in flow.steps]
        other = self.steering.random_flow(flow, seed=self.arguments.seed, excluded=excluded)
        reached = {step.site: step for step, _ in other.steps}
        return [
            reached.get(step.site) or self.steering.random_features(step, seed=1)[0]
            for step in excluded
        ]

    def _means(self, topic: str, gradient: Gradient) -> Shifts:
        """The difference of means of the one layer where it does most for the dose."""
        topical = read_topics()[topic].texts("discover")[:40]
        other = contrast_texts(topic, "discover")[: len(topical)]
        sites = dict.fromkeys(self.sketch.sites)
        states = read_texts(self.model, sites, [*topical, *other], n_tokens=24)
        means = difference_of_means(states, [True] * len(topical) + [False] * len(other))
        found = [{site: mean.float()} for site, mean in means.items()]
        return max(found, key=lambda shifts: self._promise(gradient, shifts))

    def _at_dose(self, shifts: Shifts) -> Shifts:
        scale = (self.arguments.dose / max(self.sketch.kl(shifts), 1e-12)) ** 0.5
        return {site: scale * shift for site, shift in shifts.items()}

    def _of_shifts(
        self, shifts: Shifts, tokens: Sequence[int], unsteered: Mapping[str, float]
    ) -> Iterator[dict[str, Any]]:
        """A row a corpus: gain and rise at exactly the dose."""
        dose, plan = self.arguments.dose, plan_of(shifts)
        points: list[dict[str, tuple[float, float, float]]] = []

        def few_kl(strength: float) -> float:
            at, text = plan.with_strength(strength), self.few
            return changes(text, steered_log_probs(self.model, {}, at, text), ())[0]

        strength, _ = solve_for_dose(
            few_kl, dose, guess=1.0, known={}, tolerance=0.1, max_evaluations=4, max_strength=1e4
        )
        for _ in range(3):
            at = plan.with_strength(strength)
            points.append(
                {
                    name: changes(text, steered_log_probs(self.model, {}, at, text), tokens)
                    for name, text in self.texts.items()
                }
            )
            kl = float(np.mean([found[0] for found in points[-1].values()]))
            if abs(np.log(kl / dose)) < NEAR:
                break
            strength *= (dose / kl) ** 0.5
        for name in self.texts:
            found = np.array(
                sorted([(0.0, unsteered[name], 0.0), *(each[name] for each in points)])
            )
            kl, said, rise = found.T
            yield {
                "corpus": name,
                "kl": float(kl[np.abs(kl - dose).argmin()]),
                "gain": read_off(dose**0.5, np.sqrt(kl), said) - unsteered[name],
                "rise": read_off(dose**0.5, np.sqrt(kl), rise),
                "layer": min(site.layer for site in shifts),
                "n_layers": len(shifts),
            }


def plan_of(shifts: Mapping[Site, Tensor]) -> Plan:
    """Add these vectors; strength 1 adds them as they are."""
    nodes = tuple(
        Node(at=site.short, vector=site.short, scale=float(shift.norm()))
        for site, shift in shifts.items()
    )
    return Plan(nodes=nodes, vectors={site.short: shift for site, shift in shifts.items()})


def changes(
    text: NeutralText, steered: Tensor, tokens: Sequence[int]
) -> tuple[float, float, float]:
    """(KL, words of 100, rise of the loss), each a mean over tokens."""
    kl, rise, gain, n = 0.0, 0.0, 0.0, 0
    parts = (t.split(128) for t in (steered, text.log_probs, text.next_ids))
    for after, was, following in zip(*parts, strict=True):
        kl += float(torch.linalg.vecdot(after.exp(), after - was).double().clamp(min=0).sum())
        known = following >= 0
        chosen = following.clamp(min=0)[:, None]
        rise += float((was - after).gather(1, chosen)[:, 0][known].double().sum())
        gain += float(expected_share(after, tokens, Sampling()).double().sum()) if tokens else 0.0
        n += int(known.sum())
    return kl / text.n_tokens, 100 * gain / text.n_tokens, rise / n


def tilted(text: NeutralText, tokens: Sequence[int], dose: float) -> tuple[float, float, float]:
    """(gain in words of 100, KL, rise of the loss) when the logits of the words are all raised by
    what gives the dose."""
    mass = text.log_probs[:, list(tokens)].exp().sum(-1).double()
    low, high = 0.0, 20.0
    for _ in range(60):
        shift = (low + high) / 2
        total = (1 + mass * (np.exp(shift) - 1)).log()
        kl = (shift * mass * np.exp(shift) / (1 + mass * (np.exp(shift) - 1)) - total).mean()
        low, high = (shift, high) if float(kl) < dose else (low, shift)
    raised = text.log_probs.clone()
    raised[:, list(tokens)] += shift
    found, said, rise = changes(text, raised - total[:, None].float(), tokens)
    return said - changes(text, text.log_probs, tokens)[1], found, rise


def read_off(at: float, root: np.ndarray, value: np.ndarray) -> float:
    """Linear in √KL, beyond the last point along the last piece."""
    if at <= root[-1]:
        return float(np.interp(at, root, value))
    slope = (value[-1] - value[-2]) / max(root[-1] - root[-2], 1e-9)
    return float(value[-1] + slope * (at - root[-1]))


def summary_of(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """By arm: gain, rise of the loss, and the paired differences to the controls, over topics."""
    by_topic = table.groupby(["arm", "topic"], sort=False)[["gain", "rise"]].mean().reset_index()
    gains = by_topic.pivot(index="topic", columns="arm", values="gain")
    rows = []
    for arm in table["arm"].unique():
        found = bootstrap_mean(gains[arm].tolist(), seed=seed)
        row: dict[str, Any] = {"arm": arm, "gain": found.mean, "low": found.low, "high": found.high}
        row["rise"] = float(by_topic[by_topic["arm"] == arm]["rise"].mean())
        for control in COMPARED:
            row[control] = compared(gains, arm, control, seed)
        rows.append(row)
    return pd.DataFrame(rows)


def compared(gains: pd.DataFrame, arm: str, control: str, seed: int = 0) -> str:
    """The paired difference over topics, its interval, and in how many topics it is above 0."""
    paired = bootstrap_mean((gains[arm] - gains[control]).tolist(), seed=seed)
    ahead = int((gains[arm] > gains[control]).sum())
    interval = f"[{paired.low:+.3f}, {paired.high:+.3f}]"
    return f"{paired.mean:+.3f} {interval} {ahead}/{len(gains)}"


def page_of(table: pd.DataFrame, arguments: argparse.Namespace) -> str:
    """The page in Markdown."""
    gains = table.groupby(["topic", "arm"])["gain"].mean().unstack()
    n = len(gains)
    command = (
        f"python -m benchmarks.steering_words artifacts/{arguments.artifacts.name} "
        f"--topics {n} --texts {arguments.texts} --write {arguments.write}"
    )
    lines = [
        "# Steering study: expected words at equal KL",
        "",
        f"Written by `{command}` (its docstring says how). {n} topics: {', '.join(gains.index)}. "
        f"Every arm changes the output by exactly {arguments.dose:g} nats a token, on "
        f"{arguments.texts} texts × {arguments.tokens} tokens of each of two corpora "
        f"({', '.join(CORPORA)}). The words that are counted did not choose or weight any arm, and "
        "neither did these texts. Intervals are over topics.",
        "",
        "## Does it help?",
        "",
        "Differences in the topic's words of 100 tokens [95 %], and in how many topics they are "
        "above 0.",
        "",
        *_sentences(gains, arguments.seed),
        "",
        f"{n} topics; fourteen are needed for a claim. "
        "The goal of a designed plan is +25 % over the best control, with the interval above 0. A "
        "control that is picked by its own mean is picked in its favour.",
        "",
        "## Arms",
        "",
        *_arm_rows(table, arguments.seed),
        "",
        "## Topics",
        "",
        *_topic_rows(gains),
    ]
    return "\n".join(lines) + "\n"


def _sentences(gains: pd.DataFrame, seed: int) -> Iterable[str]:
    """The designed plan and the flows against their controls; each pair once."""
    mean = gains.mean()

    def best_of(names: Iterable[str]) -> str:
        return str(mean[list(names)].idxmax())

    controls = [arm for arm in mean.index if arm not in (DESIGNED, *FLOWS, *SUPERVISED)]
    rivals = [arm for arm in mean.index if arm not in (DESIGNED, *SUPERVISED)]
    pairs = [
        (DESIGNED, best_of(rivals)),
        (DESIGNED, "single"),
        (DESIGNED, f"{K} of one layer"),
        (DESIGNED, f"{K} random, fitted"),
        ("flow", "flow's best member"),
        ("flow", "copied"),
        ("flow, learned", "flow"),
        ("flow, learned", "random flow, learned"),
        (best_of(FLOWS), best_of(controls)),
    ]
    for arm, control in dict.fromkeys(pairs):
        share = 100 * (mean[arm] / mean[control] - 1)
        yield (
            f"- `{arm}` ({mean[arm]:+.3f}) against `{control}` ({mean[control]:+.3f}): "
            f"{share:+.0f} %, difference {compared(gains, arm, control, seed)} topics."
        )


def _arm_rows(table: pd.DataFrame, seed: int) -> Iterable[str]:
    by_corpus = table.groupby(["corpus", "arm"])["gain"].mean().unstack()
    yield (
        "| arm | what it is | gain, words of 100 [95 %] | "
        + " | ".join(CORPORA)
        + " | rise of the loss | − single | − copied |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    summary = summary_of(table, seed).sort_values("gain", ascending=False)
    for row in summary.to_dict(orient="records"):
        corpora = " | ".join(f"{by_corpus.loc[corpus, row['arm']]:+.3f}" for corpus in CORPORA)
        yield (
            f"| {row['arm']} | {ARMS[row['arm']]} | {row['gain']:+.3f} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}] | {corpora} | {row['rise']:.3f} | "
            f"{row['single']} | {row['copied']} |"
        )


def _topic_rows(gains: pd.DataFrame) -> Iterable[str]:
    shown = [DESIGNED, f"{K} of one layer", "single", *FLOWS, "difference of means"]
    yield f"| topic | {' | '.join(shown)} |"
    yield "|---" * (len(shown) + 1) + "|"
    for topic, row in gains.iterrows():
        yield f"| {topic} | {' | '.join(f'{row[arm]:+.3f}' for arm in shown)} |"


def _neutral(run: Run, n_texts: int, n_tokens: int) -> Batch:
    texts = read_prompts().neutral_texts[:n_texts]
    return NeutralText.prepare(run.exact_model, texts, n_tokens=n_tokens).batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--topics", type=int, default=14)
    parser.add_argument("--at-most", type=int, default=100, help="topics measured in this call")
    parser.add_argument("--texts", type=int, default=16, help="held-out texts of each corpus")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24, help="backward passes of the sketch")
    parser.add_argument("--dose", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where results are kept; else in the run")
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser


if __name__ == "__main__":
    main()
