"""A finished run, opened for steering: what the command line, the atlas' live box, the endpoint and
the study share.

    session = SteerSession.open("artifacts/laptop")
    plan = session.plan_along_flow("L12/402", dose=0.3)          calibrated on neutral text
    session.sample("I think", [None, plan])                      unsteered and steered, from the
    same random numbers
    session.read_plan("cooking.toml")                            refused if it was made from other
    dictionaries

Opening loads the model and all residual dictionaries; everything else is lazy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data.concepts.prompts import read_prompts
from data.model.language_model import LanguageModel
from featureflow.errors import Problem, UserError
from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId, Site, parse_feature
from pipeline.context import RunContext
from pipeline.lenses.steering.selection import Sources, window_of_chain
from pipeline.lenses.steering.study_topic import World
from pipeline.run import Run
from pipeline.saes import Saes
from sae import Sae
from steering.arms import Flow, Scales, flow_additive, flow_levels, single
from steering.dose import Calibrated, NeutralText, calibrate
from steering.edits import Add, Cap, Edit, Floor
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.plan_files import read_plan
from steering.schedules import Constant, Schedule


@dataclass(frozen=True, kw_only=True)
class SteerSession:
    """Artifacts and what is loaded from them."""

    sources: Sources
    digests: dict[str, str]

    @classmethod
    def open(
        cls, artifacts: str | Path, *, device: str = "cpu", progress: Progress = silent
    ) -> SteerSession:
        """Open `<artifacts>/collect, train, link`. Raises UserError naming the command that makes
        what is missing."""
        return cls.of(Run.open(artifacts, context=RunContext(device=device, progress=progress)))

    @classmethod
    def of(cls, run: Run) -> SteerSession:
        """The same from an opened run."""
        made_from = run.need("collect", "train", "link")
        sources = Sources(
            graph=run.graph, store=run.store, saes=_residual_saes(run.saes), model=run.model
        )
        digests = {"dictionaries": made_from["train"].digest, "graph": made_from["link"].digest}
        return cls(sources=sources, digests=digests)

    @property
    def model(self) -> LanguageModel:
        return self.sources.model

    @property
    def saes(self) -> dict[Site, Sae]:
        return dict(self.sources.saes)

    @cached_property
    def norms(self) -> dict[Site, float]:
        """The median norm at every residual site."""
        return {site: self.sources.store.statistics(site).median_norm for site in self.sources.saes}

    @cached_property
    def neutral(self) -> NeutralText:
        return NeutralText.prepare(self.model, read_prompts().neutral_texts[:12], n_tokens=32)

    def window(
        self, feature: FeatureId, *, n_before: int, n_after: int
    ) -> list[tuple[FeatureId, float]]:
        """The steps of the flow through a feature."""
        return window_of_chain(self.sources, feature, n_before, n_after)

    def world(self, *, n_before: int = 3, n_after: int = 5) -> World:
        """The same, as the study and the paper's experiments see it."""
        return World(
            model=self.model,
            saes=self.saes,
            norms=self.norms,
            chain=lambda feature: self.window(feature, n_before=n_before, n_after=n_after),
            random_like=self.random_like,
        )

    def plan_along_flow(
        self,
        feature: str | FeatureId,
        *,
        dose: float | None = 0.3,
        edit: Edit | None = None,
        schedule: Schedule | None = None,
        along: str = "flow",
        n_before: int = 3,
        n_after: int = 5,
        n_rows: int = 8192,
    ) -> Plan:
        """A plan for a feature `along` its "flow" or at its "layer" alone; with a dose, calibrated
        to it.

        Raises UserError for a feature that does not exist or never fires, and when no strength
        gives the dose.
        """
        seed = parse_feature(feature) if isinstance(feature, str) else feature
        self.sources.graph.number(seed)
        if along not in ("flow", "layer"):
            raise UserError(f"cannot steer along {along!r}", expected="flow or layer")
        steps = (
            self.window(seed, n_before=n_before, n_after=n_after)
            if along == "flow"
            else [(seed, 1.0)]
        )
        profiles = self.sources.profiles([step for step, _ in steps], n_rows)
        if profiles[seed].strong == 0:
            raise UserError(
                f"{seed} never fires on the stored text", expected="a feature that is alive"
            )
        firing = tuple(step for step in steps if profiles[step[0]].strong > 0)
        scales = Scales(
            norms=self.norms, activations={step: profiles[step].strong for step, _ in firing}
        )
        plan = _laid_out(
            Flow(seed=seed, steps=firing), scales, edit or Add(), schedule or Constant(), along
        )
        plan = self.signed(replace(plan, name=f"{seed} {plan.edit.kind} along {along}"))
        return plan if dose is None else self.calibrated(plan, dose)

    def signed(self, plan: Plan) -> Plan:
        """The plan with what it was made from: the model, and where it names features their
        dictionaries and graph."""
        named = any(node.feature is not None for node in plan.nodes)
        return replace(plan, model=self.model.fingerprint, digests=self.digests if named else {})

    def read_plan(self, path: str | Path) -> Plan:
        """A plan file that may be used here. Raises UserError for one made for another model or
        other dictionaries: its latents would be other features."""
        plan = read_plan(path)
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
        if plan.model and plan.model != self.model.fingerprint:
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
                f"{path} does not belong to these artifacts",
                problems=tuple(problems),
                fix="make it again (featureflow steer plan), or name its own run with --artifacts "
                "and --recipe",
            )
        return plan

    def calibrated(self, plan: Plan, dose: float) -> Plan:
        """The plan at the strength that gives `dose` nats. Raises UserError when none does."""
        (found,) = calibrate(self.model, self.saes, plan, self.neutral, [dose])
        if not found.reached:
            raise UserError(
                f"no strength of this plan gives {dose:g} nats",
                expected=f"about {dose:g}",
                found=_reached(found),
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

    def random_like(self, feature: FeatureId, seed: int) -> FeatureId:
        """Another living feature of the site, with density within a factor of four where there is
        one."""
        nodes = self.sources.graph.nodes
        here = nodes[
            (nodes["site"] == feature.site.short)
            & nodes["alive"]
            & (nodes["latent"] != feature.latent)
        ]
        own = float(self.sources.graph.node(feature)["density"])
        near = here[(here["density"] >= own / 4) & (here["density"] <= own * 4)]
        pool = (near if len(near) else here)["latent"].to_numpy()
        generator = np.random.default_rng([seed, feature.site.layer, feature.latent])
        return FeatureId(feature.site, int(generator.choice(pool)))


def _laid_out(flow: Flow, scales: Scales, edit: Edit, schedule: Schedule, along: str) -> Plan:
    if isinstance(edit, Add):
        return (
            single(flow, scales)
            if along == "layer"
            else flow_additive(flow, scales, schedule=schedule)
        )
    if not isinstance(edit, (Floor, Cap)):
        return replace(flow_levels(flow, scales, edit=Floor(), schedule=schedule), edit=edit)
    return flow_levels(flow, scales, edit=edit, schedule=schedule)


def _residual_saes(saes: Saes) -> dict[Site, Sae]:
    found = {site: saes[site] for site in saes if site.kind == "resid_post"}
    if not found:
        raise UserError(
            "there is no dictionary of a residual site",
            where=str(saes.folder),
            fix="add resid_post to collect.sites",
        )
    return found


def _reached(found: Calibrated) -> str:
    return f"{found.measured.kl:.3g} at strength {found.strength:.3g}"
