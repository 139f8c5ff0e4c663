"""What a push makes the model say, at exactly equal KL: `python -m benchmarks.steering_words
artifacts/laptop`.

1. Per topic: the topic's lexicon is dealt into two halves; every arm is chosen and weighted with
   one half, on neutral text, and measured with the other half, on other text.
2. Measure: expected topic words of 100 tokens under the sampling rule (temperature 0.8, top-k 512,
   top-p 0.95), teacher-forced on held-out text of two corpora. Nothing is sampled.
3. Equal dose: the strength is sought that gives the dose on these texts (to 10 %), and the gain is
   read off at exactly that KL, on each corpus for itself (linear in √KL between the strengths
   tried).
4. Arms: the best single feature of any layer (by the rule that all arms are chosen by), the same
   direction copied along its flow, the flow, both with fitted weights, a random flow with fitted
   weights, k features of any layer, k of one layer, k random features with fitted weights, the
   difference of means and the dense vector (one layer, chosen by the same rule), and a tilt of the
   counted words' own logits, as an upper mark.
5. Interval: bootstrap over topics; differences are paired. Nothing is chosen on what is reported.

Cost: about 40 short forward passes and one backward pass a topic. Results go on where they were
stopped. `--write docs/steering-words.md` writes the page.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from steering.arms import Flow, Scales, along_flow, along_vectors, copied, single
from steering.design import (
    Candidates,
    Designed,
    Gradient,
    Sketch,
    as_plan,
    candidates_of,
    dense,
    gradient_of,
    select,
    sketch_of,
    words,
)
from steering.dose import NeutralText, solve_for_dose, steered_log_probs
from steering.exports import added_vectors
from steering.features import difference_of_means, read_texts
from steering.generation import Sampling
from steering.plan import Node, Plan
from steering.teacher_forced import expected_share, lexicon_tokens

K, N_BEFORE, N_AFTER = 8, 3, 8
CORPORA = ("wiki", "recipes")
COMPARED = ("single", "copied")
SUPERVISED = ("difference of means", "dense", "logit tilt")


def main() -> None:
    """Measure the topics that are not measured yet, then write table and page."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.artifacts / "steering-words"
    folder.mkdir(exist_ok=True)
    run = Run.open(arguments.artifacts, context=RunContext(n_threads=arguments.threads))
    bench = Bench(run, arguments)
    names = sorted(read_topics())
    drawn = np.random.default_rng(arguments.seed).permutation(len(names))[: arguments.topics]
    for topic in (names[k] for k in drawn):
        path = folder / f"{topic}.json"
        if not path.exists():
            rows = list(bench.rows(topic))
            path.write_text(json.dumps(rows))
            print(f"{time.strftime('%H:%M:%S')} {topic}", flush=True)
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    table = pd.DataFrame(rows)
    page = page_of(table, arguments)
    print(page)
    if arguments.write:
        arguments.write.write_text(page, encoding="utf-8")


class Bench:
    """A run, its sketch, and the texts that everything is measured on."""

    def __init__(self, run: Run, arguments: argparse.Namespace) -> None:
        self.run, self.arguments = run, arguments
        self.model, self.steering = run.steering.model, run.steering
        model = run.exact_model
        texts = read_prompts().neutral_texts
        self.neutral = NeutralText.prepare(model, texts, n_tokens=32).batch
        first = (model.n_layers - 1) / 3
        sites = [site for site in self.steering.saes if site.layer >= first]
        self.sketch: Sketch = sketch_of(
            model, self.neutral, sites, n_samples=arguments.samples, seed=arguments.seed
        )
        self.texts = {name: self._held_out(name) for name in CORPORA}

    def _held_out(self, corpus: str) -> NeutralText:
        """The last documents of a packaged corpus: the run's text is taken from the first."""
        documents = [document.text for document in iter_packaged_text(corpus)][-400:]
        generator = np.random.default_rng(self.arguments.seed)
        chosen = [documents[k] for k in generator.permutation(len(documents))]
        n = self.arguments.texts
        return NeutralText.prepare(
            self.model, [text[:600] for text in chosen[:n]], n_tokens=self.arguments.tokens
        )

    def rows(self, topic: str) -> Iterator[dict[str, Any]]:
        """One row an arm and corpus."""
        lexicon = sorted(read_topics()[topic].lexicon)
        chosen, measured = (tuple(lexicon_tokens(self.model, lexicon[half::2])) for half in (0, 1))
        measured = tuple(sorted(set(measured) - set(chosen)))
        gradient = gradient_of(self.run.exact_model, self.neutral, self.sketch.sites, words(chosen))
        for arm, plan in self.plans(topic, gradient).items():
            yield from self._of_plan(topic, arm, plan, measured)
        for corpus, text in self.texts.items():
            gain, kl = tilted(text.log_probs, measured, measured, self.arguments.dose)
            yield {
                "topic": topic, "arm": "logit tilt", "corpus": corpus, "kl": kl, "gain": gain
            }  # fmt: skip

    def plans(self, topic: str, gradient: Gradient) -> dict[str, Plan]:
        """Every arm, at the strength that should give the dose."""
        saes, norms = self.steering.saes, self.steering.norms
        scales = Scales(norms=norms, activations={})
        everything = candidates_of(gradient, self.sketch, saes)
        seed = everything.features[0]
        flow = self.steering.flow(seed, n_before=N_BEFORE, n_after=N_AFTER)
        flow = _within(flow, self.sketch.sites)
        other = self._random_flow(flow)
        generator = np.random.default_rng([self.arguments.seed, len(topic)])
        layer = seed.site

        def fitted(allowed: Callable[[FeatureId], bool], k: int = K) -> Plan:
            return self._fitted(candidates_of(gradient, self.sketch, saes, allowed=allowed), k)

        drawn = {
            FeatureId(site, int(latent))
            for site in self.sketch.sites
            for latent in generator.permutation(len(saes[site].W_dec))[:4]
        }
        by_layer = {site: dense(gradient, self.sketch, site) for site in self.sketch.sites}
        best = max(by_layer, key=lambda site: by_layer[site][1])
        members, others = ({step for step, _ in each.steps} for each in (flow, other))
        found = {
            "single": single(flow, scales),
            "copied": copied(flow, scales),
            "flow": along_flow(flow, scales),
            "copied, fitted": self._copied_fitted(flow, gradient),
            "flow, fitted": fitted(members.__contains__),
            "random flow, fitted": fitted(others.__contains__),
            f"{K} of any layer": fitted(lambda _: True),
            f"{K} of one layer": fitted(lambda f: f.site == layer),
            f"{K} random, fitted": fitted(drawn.__contains__),
            "difference of means": along_vectors(self._means(topic, gradient), scales),
            "dense": along_vectors({best: by_layer[best][0]}, scales, name="dense"),
        }
        return {name: self._at_dose(plan) for name, plan in found.items()}

    def _fitted(self, candidates: Candidates, k: int) -> Plan:
        return as_plan(select(candidates, k), self.steering.norms, dose=self.arguments.dose)

    def _copied_fitted(self, flow: Flow, gradient: Gradient) -> Plan:
        """The seed's direction at every site of the flow, with non-negative fitted weights."""
        row = self.steering.saes[flow.seed.site].W_dec[flow.seed.latent].float()
        unit = row / row.norm()
        features = tuple(step for step, _ in flow.steps)
        effect = np.array([float(gradient[f.site] @ unit) for f in features])
        rows = torch.stack([self.sketch.through(f.site, unit[None])[:, 0] for f in features], dim=1)
        found: Designed = select(
            Candidates(features=features, effect=effect, rows=rows.double().numpy()), len(features)
        )
        plan = as_plan(found, self.steering.norms, dose=self.arguments.dose)
        nodes = tuple(
            node
            if node.at == str(flow.seed)
            else Node(
                at=node.site.short,
                direction_of=str(flow.seed),
                weight=node.weight,
                scale=node.scale,
            )
            for node in plan.nodes
        )
        return replace(plan, nodes=nodes)

    def _random_flow(self, flow: Flow) -> Flow:
        excluded = [step for step, _ in flow.steps]
        return self.steering.random_flow(flow, seed=self.arguments.seed, excluded=excluded)

    def _means(self, topic: str, gradient: Gradient) -> dict[Site, Tensor]:
        """The difference of means of the one layer where it does most for the dose."""
        topical = read_topics()[topic].texts("discover")[:40]
        other = contrast_texts(topic, "discover")[: len(topical)]
        sites = dict.fromkeys(self.sketch.sites)
        states = read_texts(self.model, sites, [*topical, *other], n_tokens=24)
        found = difference_of_means(states, [True] * len(topical) + [False] * len(other))

        def per_root_kl(site: Site) -> float:
            effect = float(gradient[site] @ found[site].float())
            return effect / max(float(self.sketch.cost(site, found[site].float()[None])), 1e-12)

        best = max(found, key=per_root_kl)
        return {best: found[best].float()}

    def _at_dose(self, plan: Plan) -> Plan:
        kl = self.sketch.kl(added_vectors(plan, self.steering.saes))
        return plan.with_strength(plan.strength * (self.arguments.dose / kl) ** 0.5)

    def _of_plan(
        self, topic: str, arm: str, plan: Plan, tokens: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        dose, points = self.arguments.dose, dict[float, dict[str, tuple[float, float, float]]]()

        def mean_kl(strength: float) -> float:
            at = plan.with_strength(strength)
            points[strength] = {
                name: self._measured(at, text, tokens) for name, text in self.texts.items()
            }
            return float(np.mean([found[0] for found in points[strength].values()]))

        solve_for_dose(
            mean_kl,
            dose,
            guess=plan.strength,
            known={},
            tolerance=0.1,
            max_evaluations=5,
            max_strength=1e4,
        )
        for name in self.texts:
            found = np.array(sorted([(0.0, 0.0, 0.0), *(each[name] for each in points.values())]))
            kl, gain, rise = found.T
            yield {
                "topic": topic,
                "arm": arm,
                "corpus": name,
                "kl": float(kl[np.abs(kl - dose).argmin()]),
                "gain": _read_off(dose**0.5, np.sqrt(kl), gain),
                "rise": _read_off(dose**0.5, np.sqrt(kl), rise),
                "layer": min(node.site.layer for node in plan.nodes),
                "n_nodes": len(plan.nodes),
            }

    def _measured(
        self, plan: Plan, text: NeutralText, tokens: Sequence[int]
    ) -> tuple[float, float, float]:
        """(KL, gain in words of 100, rise of the loss)."""
        steered = steered_log_probs(self.model, self.steering.saes, plan, text)
        kl = torch.linalg.vecdot(steered.exp(), steered - text.log_probs).double().clamp(min=0)
        known = text.next_ids >= 0
        following = text.next_ids.clamp(min=0)[:, None]
        rise = (text.log_probs - steered).gather(1, following)[:, 0][known].double().mean()
        return float(kl.mean()), _words_gained(steered, text.log_probs, tokens), float(rise)


def tilted(
    log_probs: Tensor, chosen: Sequence[int], tokens: Sequence[int], dose: float
) -> tuple[float, float]:
    """(gain in words of 100, KL) when the logits of `chosen` are all raised by what gives the
    dose."""
    mass = log_probs[:, list(chosen)].exp().sum(-1).double()
    low, high = 0.0, 20.0
    for _ in range(60):
        shift = (low + high) / 2
        total = (1 + mass * (np.exp(shift) - 1)).log()
        kl = (shift * mass * np.exp(shift) / (1 + mass * (np.exp(shift) - 1)) - total).mean()
        low, high = (shift, high) if float(kl) < dose else (low, shift)
    raised = log_probs.clone()
    raised[:, list(chosen)] += shift
    return _words_gained(raised.log_softmax(-1), log_probs, tokens), float(kl)


def _words_gained(steered: Tensor, before: Tensor, tokens: Sequence[int]) -> float:
    after, was = (expected_share(p, tokens, Sampling()).mean() for p in (steered, before))
    return 100 * float(after - was)


def _read_off(at: float, root: np.ndarray, value: np.ndarray) -> float:
    """Linear in √KL, beyond the last point along the last piece."""
    if at <= root[-1]:
        return float(np.interp(at, root, value))
    slope = (value[-1] - value[-2]) / max(root[-1] - root[-2], 1e-9)
    return float(value[-1] + slope * (at - root[-1]))


def _within(flow: Flow, sites: Sequence[Site]) -> Flow:
    return replace(flow, steps=tuple(step for step in flow.steps if step[0].site in sites))


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
            paired = bootstrap_mean((gains[arm] - gains[control]).tolist(), seed=seed)
            row[control] = f"{paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"
            row[f"ahead of {control}"] = f"{int((gains[arm] > gains[control]).sum())}/{len(gains)}"
        rows.append(row)
    return pd.DataFrame(rows)


def page_of(table: pd.DataFrame, arguments: argparse.Namespace) -> str:
    """The page in Markdown."""
    summary, n = summary_of(table, arguments.seed), table["topic"].nunique()
    mean = summary.set_index("arm")["gain"]
    rivals = mean.drop([*SUPERVISED, f"{K} of any layer", "flow", "flow, fitted"])
    best = rivals.idxmax()
    lines = [
        "# Steering study: expected words at equal KL",
        "",
        f"Written by `python -m benchmarks.steering_words {arguments.artifacts.name} --topics "
        f"{arguments.topics} --write docs/steering-words.md` (module docstring: how). {n} topics: "
        f"{', '.join(sorted(table['topic'].unique()))}; dose {arguments.dose:g} nats, read off "
        f"exactly, on {arguments.texts} texts × {arguments.tokens} tokens of each of two corpora "
        f"({', '.join(CORPORA)}). Words that are counted were not used to choose.",
        "",
        f"The best unsupervised control here is `{best}` ({mean[best]:+.3f}); {K} features of any "
        f"layer gain {mean[f'{K} of any layer']:+.3f}, the flow {mean['flow']:+.3f}, the flow with "
        f"fitted weights {mean['flow, fitted']:+.3f}, one feature {mean['single']:+.3f} of the "
        "topic's words in 100 tokens.",
        "",
        "| arm | gain, words of 100 | 95 % | rise of loss | − single | ahead | − copied | ahead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['arm']} | {row['gain']:+.3f} | [{row['low']:+.3f}, {row['high']:+.3f}] | "
        f"{row['rise']:.3f} | {row['single']} | {row['ahead of single']} | {row['copied']} | "
        f"{row['ahead of copied']} |"
        for row in summary.to_dict(orient="records")
    ]
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--topics", type=int, default=14)
    parser.add_argument("--texts", type=int, default=32, help="held-out texts of each corpus")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24, help="backward passes of the sketch")
    parser.add_argument("--dose", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="the page to write")
    return parser


if __name__ == "__main__":
    main()
