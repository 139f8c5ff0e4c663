"""A run that is steered: plans along its flows, at a dose, and samples beside unsteered ones.

    run = Run.open("artifacts/laptop")
    plan = run.plan("L12/402", dose=0.3)                 calibrated on neutral text
    without = run.remove("L12/402")                      ablated along its whole flow
    run.sample("I think", [None, plan])                  from the same random numbers
    run.steering.read_plan("cooking.toml")               refused if it was made from other SAEs

1. A flow is the chain of best links through a feature, cut to some layers, on residual sites.
2. Units: the median norm of a site, and a typical strong activation of a feature (both from the
   store). Features of the flow that were never active in it are left out.
3. The strength is found that gives the dose: nats of KL a token on neutral text (steering/dose.py).
4. A plan says which model, SAEs and graph it was made from; a plan of others is refused.

The command line, the stage, the lenses, the live page and the endpoint all steer through here.
Cost: reading a plan nothing; making one reads a few thousand rows of the store a site and 2 to 4
short forward passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor

from data.concepts.prompts import read_prompts
from data.model.fingerprint import same_weights
from data.model.language_model import LanguageModel
from data.store import ActivationStore
from featureflow.errors import Command, Problem, UserError
from featureflow.sites import FeatureId, Site, parse_feature
from pipeline.artifact import Artifact
from pipeline.flow.graph import FlowGraph
from pipeline.saes import Saes
from sae import Sae
from steering.arms import Flow, Scales, along_flow
from steering.dose import NeutralText, calibrate
from steering.edits import Add, Edit
from steering.features import Profile, profile_features
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.plan_files import read_plan
from steering.removal import along_whole_flow
from steering.schedules import Constant, Schedule
from steering.scopes import WhereActive

N_CONTROL_DRAWS = 16
_DENSITY_FACTOR = 4


class RunParts(Protocol):
    """What is needed of a `Run`."""

    @property
    def graph(self) -> FlowGraph: ...
    @property
    def store(self) -> ActivationStore: ...
    @property
    def saes(self) -> Saes: ...
    @property
    def model(self) -> LanguageModel: ...
    def artifact(self, stage: str) -> Artifact: ...


class Steering:
    """What steers a run. Opened by `Run.steering`."""

    def __init__(self, run: RunParts) -> None:
        self._run = run

    @property
    def graph(self) -> FlowGraph:
        return self._run.graph

    @property
    def model(self) -> LanguageModel:
        return self._run.model

    @cached_property
    def saes(self) -> dict[Site, Sae]:
        """Those of residual sites, in order of depth. Raises UserError where there is none."""
        saes = self._run.saes
        found = {site: saes[site] for site in saes if site.kind == "resid_post"}
        if not found:
            raise UserError(
                "there is no dictionary of a residual site",
                where=str(saes.folder),
                fix="add resid_post to collect.sites",
            )
        return found

    @cached_property
    def digests(self) -> dict[str, str]:
        """What a plan that names features depends on."""
        artifact = self._run.artifact
        return {"dictionaries": artifact("train").digest, "graph": artifact("link").digest}

    @cached_property
    def norms(self) -> dict[Site, float]:
        """The median norm at every residual site."""
        return {site: self._run.store.statistics(site).median_norm for site in self.saes}

    @cached_property
    def neutral(self) -> NeutralText:
        """What doses are measured on."""
        return NeutralText.prepare(self.model, read_prompts().neutral_texts[:12], n_tokens=32)

    def flow(self, seed: FeatureId, *, n_before: int = 3, n_after: int = 5) -> Flow:
        """The flow through `seed`, from `n_before` layers before it to `n_after` after."""
        low, high = seed.site.layer - n_before, seed.site.layer + n_after
        steps = (
            (step.feature, 1.0 if step.cosine is None else step.cosine)
            for step in self.graph.chain(seed)
            if low <= step.feature.site.layer <= high and step.feature.site in self.saes
        )
        return Flow(seed=seed, steps=tuple(steps))

    def plan(
        self,
        feature: str | FeatureId,
        *,
        dose: float | None = 0.3,
        edit: Edit | None = None,
        schedule: Schedule | None = None,
        along: Literal["flow", "layer"] = "flow",
        n_before: int = 3,
        n_after: int = 5,
        n_rows: int = 8192,
    ) -> Plan:
        """A plan for a feature `along` its "flow" or at its "layer" alone; with a dose, calibrated
        to it.

        Raises UserError for a feature that does not exist or is never active, and when no strength
        gives the dose.
        """
        seed = parse_feature(feature) if isinstance(feature, str) else feature
        self.graph.number(seed)
        if along not in ("flow", "layer"):
            raise UserError(f"cannot steer along {along!r}", expected="flow or layer")
        flow = Flow.of_one(seed)
        if along == "flow":
            flow = self.flow(seed, n_before=n_before, n_after=n_after)
        profiles = self.profiles([step for step, _ in flow.steps], n_rows)
        if profiles[seed].strong == 0:
            raise UserError(
                f"{seed} is never active on the stored text", expected="a feature that is alive"
            )
        active = tuple(step for step in flow.steps if profiles[step[0]].strong > 0)
        edit = edit or Add()
        plan = along_flow(
            Flow(seed=seed, steps=active),
            Scales(norms=self.norms, activations={f: profiles[f].strong for f, _ in active}),
            edit=edit,
            schedule=schedule or Constant(),
            name=f"{seed} {edit.kind} along {along}",
        )
        plan = self.signed(plan)
        return plan if dose is None else self.calibrated(plan, dose)

    def remove(
        self, feature: str | FeatureId, *, every: int = 1, where_active: bool = False
    ) -> Plan:
        """A plan that ablates a feature along its whole flow, from its own layer to the flow's end,
        or every n-th step of it; with `where_active` only on tokens where the feature itself is
        active, so that nothing before them changes. Raises UserError for a feature that does not
        exist or has no flow in the residual stream."""
        seed = parse_feature(feature) if isinstance(feature, str) else feature
        self.graph.number(seed)
        if seed.site not in self.saes:
            raise UserError(
                f"{seed} is not in the residual stream",
                expected=", ".join(site.short for site in self.saes),
            )
        flow = self.flow(seed, n_before=0, n_after=self.model.n_layers)
        plan = along_whole_flow(flow, every=every)
        if where_active:
            plan = replace(plan, scope=WhereActive(feature=str(seed)))
        return self.signed(plan)

    def signed(self, plan: Plan) -> Plan:
        """The plan with what it was made from: the model, and where it names features their SAEs
        and graph."""
        named = any(node.feature is not None for node in plan.nodes)
        return replace(plan, model=self.model.fingerprint, digests=self.digests if named else {})

    def read_plan(self, path: str | Path) -> Plan:
        """A plan file that may be used here. Raises UserError for one made for another model or
        from other SAEs: its latents would be other features."""
        plan = read_plan(path)
        self.check_plan(plan, where=str(path))
        return plan

    def check_plan(self, plan: Plan, *, where: str) -> None:
        """Raises UserError for a plan that was made for another model or from other SAEs."""
        own, theirs = self.digests["dictionaries"], plan.digests.get("dictionaries", "")
        problems = []
        if theirs and theirs != own:
            problems.append(
                Problem(
                    what="made from other dictionaries",
                    where="digests.dictionaries",
                    expected=own,
                    found=theirs,
                )
            )
        if plan.model and not same_weights(plan.model, self.model.fingerprint):
            problems.append(
                Problem(
                    what="made for another model",
                    where="model",
                    expected=self.model.fingerprint,
                    found=plan.model,
                )
            )
        if problems:
            raise UserError(
                f"{where} does not belong to these artifacts",
                problems=tuple(problems),
                fix=Command("steer", "plan", note="or name the run it was made for with --name"),
            )

    def calibrated(self, plan: Plan, dose: float) -> Plan:
        """The plan at the strength that gives `dose` nats. Raises UserError when none does."""
        (found,) = calibrate(self.model, self.saes, plan, self.neutral, [dose])
        if not found.reached:
            raise UserError(
                f"no strength of this plan gives {dose:g} nats",
                expected=f"about {dose:g}",
                found=f"{found.measured.kl:.3g} at strength {found.strength:.3g}",
                fix="ask for a smaller dose, or for the edit add",
            )
        return plan.with_strength(found.strength, dose=found.measured.kl)

    def sample(
        self,
        prompt: str,
        plans: Sequence[Plan | None],
        *,
        n_samples: int = 1,
        n_new_tokens: int = 40,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> tuple[Sample, ...]:
        """Continuations of one prompt under every plan, in the order of the plans."""
        sampling = Sampling(n_tokens=n_new_tokens, temperature=temperature)
        return generate(
            self.model,
            self.saes,
            [prompt],
            plans,
            n_samples=n_samples,
            seed=seed,
            sampling=sampling,
        ).samples

    def profiles(self, features: Sequence[FeatureId], n_rows: int) -> dict[FeatureId, Profile]:
        """What features read in the first kept training rows; one reading of the store a site."""
        rows = self._run.store.kept_rows("train")[:n_rows]
        ids = self._run.store.tokens().id[rows].astype(np.int64)
        by_site: dict[Site, list[int]] = {}
        for feature in dict.fromkeys(features):
            by_site.setdefault(feature.site, []).append(feature.latent)
        found = (
            profile_features(self.saes[site], site, self._blocks(site, rows), ids, latents)
            for site, latents in by_site.items()
        )
        return {profile.feature: profile for profiles in found for profile in profiles}

    def random_features(
        self, feature: FeatureId, *, seed: int, excluded: Collection[FeatureId] = ()
    ) -> list[FeatureId]:
        """Other living features of the site in random order, with density within a factor of four
        where there are such; the feature itself where there is no other."""
        nodes = self.graph.nodes
        here = nodes[(nodes["site"] == feature.site.short) & nodes["alive"]]
        density = float(self.graph.node(feature)["density"])
        near = here["density"].between(density / _DENSITY_FACTOR, density * _DENSITY_FACTOR)
        refused = {feature, *excluded}
        for pool in (here[near], here):
            free = [FeatureId(feature.site, int(latent)) for latent in pool["latent"]]
            if free := [other for other in free if other not in refused]:
                break
        generator = np.random.default_rng([seed, feature.site.layer, feature.latent])
        return [free[place] for place in generator.permutation(len(free))] or [feature]

    def random_flow(self, flow: Flow, *, seed: int, excluded: Collection[FeatureId] = ()) -> Flow:
        """A random control of a flow: of a few random features like its seed, the one whose own
        flow covers most of its sites, cut to these."""
        found = []
        for other in self.random_features(flow.seed, seed=seed, excluded=excluded):
            whole = self.flow(other, n_before=other.site.layer, n_after=10_000)
            steps = tuple(step for step in whole.steps if step[0].site in flow.sites)
            found.append(Flow(seed=other, steps=steps))
            if len(found) == N_CONTROL_DRAWS:
                break
        return max(found, key=lambda each: len(each.steps))

    def _blocks(self, site: Site, rows: np.ndarray) -> Iterator[Tensor]:
        for part in np.array_split(rows, max(1, len(rows) // 2048)):
            start, stop = int(part[0]), int(part[-1]) + 1
            read = self._run.store.read(site, start, stop)[part - start]
            yield torch.from_numpy(np.ascontiguousarray(read))


def is_content_word(token: str) -> bool:
    """At least three letters, and no English function word."""
    word = token.strip().lower()
    return len(word) >= 3 and word.isalpha() and word not in ENGLISH_STOP_WORDS
