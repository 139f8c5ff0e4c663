"""One run, opened once: everything that its stages left, each part when it is first asked for.

    run = Run.open("artifacts/laptop")
    run.saes[parse_site("L12")]     run.graph.chain("L12/402")     run.labels["L12/402"]
    run.sample("I think", [None, run.plan("L12/402", dose=0.3)])

1. An artifact records the digests of what it was made from. `featureflow train --train.n_latents
   4096` replaces the SAEs and leaves the flow graph of the earlier ones beside them: latent 402 is
   another feature then. An artifact is given only if everything beneath it is what it was made
   from. Nothing is read for that but manifests.
2. `model` is the one that the activations were collected from: its fingerprint is compared here,
   for every consumer.
3. Nobody else opens a store, a model, an SAE or a graph of a run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter

from data.model.fingerprint import VERSION
from data.model.language_model import LanguageModel
from data.model.spec import ModelSpec
from data.store import ActivationStore
from data.tokens import TokenTable
from featureflow.errors import Command, Fix, Problem, UserError
from featureflow.sites import FeatureId, Site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe.features import Features
from pipeline.findings import Finding, open_finding, read_finding
from pipeline.flow.graph import FlowGraph
from pipeline.flow.sources import HeldOutRows
from pipeline.saes import FOLDER, Saes
from pipeline.steering_run import Steering
from pipeline.trace.document import Document
from pipeline.trace.kept import open_trace, read_document
from pipeline.trace.prompt import trace_prompt
from pipeline.trace.trace import Trace
from pipeline.training.batch_jobs import TRANSCODERS
from steering.generation import Sample
from steering.plan import Plan

Item = TypeVar("Item")
STORE = "store.zarr"
"""The store in a collect artifact: a folder, or a small file that points to one elsewhere."""


class Run:
    """The artifacts of one run and what they hold. `root` is their folder; SAEs and model are on
    the context's device."""

    def __init__(
        self, root: Path, *, context: RunContext, given: Mapping[str, Artifact] | None = None
    ) -> None:
        self.root = root
        self.context = context
        self._given = given
        self._opened = dict(given or {})

    @classmethod
    def open(cls, root: str | Path, *, context: RunContext | None = None) -> Run:
        """The run in a folder such as `artifacts/laptop`. Raises UserError when no stage ran there;
        later, when a part is asked for that is missing, damaged or made from others."""
        root = Path(root)
        if not any((root / stage).is_dir() for stage in SCHEMAS):
            others = [path.name for path in root.parent.glob("*") if (path / "collect").is_dir()]
            raise UserError(
                "there is no run here",
                where=str(root),
                expected=f"a folder with {', '.join(SCHEMAS)}",
                found=f"runs beside it: {', '.join(sorted(others))}" if others else None,
                fix=Command("run"),
            )
        return cls(root, context=context or RunContext())

    @classmethod
    def of(cls, artifacts: Mapping[str, Artifact], *, context: RunContext | None = None) -> Run:
        """These artifacts by stage, wherever they lie: what the schedule hands to a stage."""
        root = next(iter(artifacts.values())).path.parent
        return cls(root, context=context or RunContext(), given=artifacts)

    def each(self, label: str, items: Collection[Item]) -> Iterator[Item]:
        """The items one after another, reported as progress under the label and a site's name."""
        for done, item in enumerate(items):
            at = f" {item.short}" if isinstance(item, Site) else ""
            self.context.progress(label + at, done, len(items))
            yield item
        self.context.progress(label, len(items), len(items))

    def artifact(self, stage: str) -> Artifact:
        """What a stage left. Raises UserError that names the command when it is missing, damaged or
        made from other artifacts than those of this run."""
        return self.need(stage)[stage]

    def need(self, *stages: str) -> dict[str, Artifact]:
        """What these stages left. Raises UserError with all that is missing, or all that does not
        belong together."""
        if unknown := [stage for stage in stages if stage not in SCHEMAS]:
            raise UserError(f"there is no stage {unknown[0]!r}", expected=", ".join(SCHEMAS))
        found, missing = {}, []
        for stage in stages:
            try:
                found[stage] = self._open(stage)
            except UserError as error:
                missing.append(error)
        latest = max(stages, key=list(SCHEMAS).index)
        if len(missing) == 1:
            raise missing[0]
        if missing:
            problems = tuple(problem for error in missing for problem in error.problems)
            what = f"{self.root} lacks what is needed"
            raise UserError(what, problems=problems, fix=Command("run", to=latest))
        self._check_together(found, fix=Command("run", to=latest))
        return found

    def has(self, stage: str) -> bool:
        """Whether `artifact(stage)` would give one."""
        try:
            return bool(self.artifact(stage))
        except UserError:
            return False

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Every stage's artifact that is here and belongs to the run, in the order of the road."""
        return {stage: self.artifact(stage) for stage in SCHEMAS if self.has(stage)}

    @cached_property
    def store(self) -> ActivationStore:
        """The collected activations."""
        return ActivationStore.open(self.artifact("collect").path / STORE)

    @cached_property
    def tokens(self) -> TokenTable:
        """The token, document and position of every row of the store."""
        return self.store.tokens()

    @cached_property
    def saes(self) -> Saes:
        """The SAEs that later stages use, by site; each is kept once it is read."""
        return Saes(self.artifact("train").path / FOLDER, device=self.context.device)

    @cached_property
    def transcoders(self) -> Saes:
        """The transcoders, by the site that they write. Raises UserError when there are none."""
        folder = self.artifact("train").path / TRANSCODERS
        if not folder.is_dir():
            fix = "train.transcoders in the recipe, with resid_mid and mlp_out in collect.sites"
            raise UserError("this run has no transcoders", where=str(self.root), fix=fix)
        return Saes(folder, device=self.context.device)

    @cached_property
    def model(self) -> LanguageModel:
        """The model that the activations were collected from. Raises UserError if its weights are
        others now."""
        collect = self.artifact("collect")
        self.store.check_language_model()
        if "model" not in collect.config:
            raise UserError(
                "the activations do not say which model they are from",
                where=str(collect.path),
                fix="collect them with a model named in the recipe; to evaluate without a model, "
                "set evaluate.ce_tokens to 0",
            )
        model = LanguageModel.open(
            self._spec,
            dtype=self.store.provenance.get(
                "model_dtype", collect.config.get("model_dtype", "auto")
            ),
            device=self.context.device,
            progress=self.context.progress,
        )
        expected = self.store.provenance.get("model_fingerprint")
        if expected is not None and expected != model.fingerprint:
            is_old = not expected.startswith(f"{VERSION}:")
            raise UserError(
                "the activations name their model in the way of an earlier version, which left out "
                "buffers and digits of float32"
                if is_old
                else f"{model.name} is not the model that the activations were collected from",
                where=self.store.url,
                expected=f"fingerprint {expected[:12]}",
                found=f"fingerprint {model.fingerprint[:12]}",
                fix=(Command("collect", force=True), "the stages after it with --force"),
            )
        stream = [site for site in self.store.sites if site.kind.startswith("resid")]
        widths = {self.store.width(site) for site in stream}
        if not widths <= {model.d_model}:
            raise UserError(
                f"{model.name} is not the model that the activations are from",
                where=self.store.url,
                expected=f"a model of width {', '.join(map(str, sorted(widths)))}",
                found=f"width {model.d_model}",
                fix="name the model of the imported store: collect.model",
            )
        return model

    @cached_property
    def exact_model(self) -> LanguageModel:
        """The same model in float32, for small differences of logits."""
        if self.model.dtype == torch.float32:
            return self.model
        return LanguageModel.open(self._spec, dtype="float32", device=self.context.device)

    @property
    def _spec(self) -> ModelSpec:
        return TypeAdapter(ModelSpec).validate_python(self.artifact("collect").config["model"])

    @cached_property
    def graph(self) -> FlowGraph:
        """The flow graph, with the column `gradient_effect` where the lens attribution measured
        links of this graph."""
        graph = FlowGraph.open(self.artifact("link").path)
        self.add_effects(graph)
        return graph

    def add_effects(self, graph: FlowGraph) -> None:
        """Give a graph's edges what the lens attribution found of them, if it looked at this run's
        graph."""
        with suppress(UserError):
            graph.add_column("gradient_effect", self.lens("attribution").tables["edges"])

    @cached_property
    def features(self) -> Features:
        """Features, labels, examples and documents as tables."""
        return Features(self.artifact("describe").path)

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """Feature id → label; the empty text for a feature that is never active."""
        features = self.features.table
        return dict(zip(features["feature"], features["label"], strict=True))

    @cached_property
    def steering(self) -> Steering:
        """What steers this run: units, flows, doses, plan files (pipeline/steering_run.py)."""
        return Steering(self)

    def plan(self, feature: str | FeatureId, **options: Any) -> Plan:
        """A plan for a feature along its flow, calibrated to a dose; see `Steering.plan`."""
        return self.steering.plan(feature, **options)

    def remove(self, feature: str | FeatureId, **options: Any) -> Plan:
        """A plan that removes a feature along its whole flow; see `Steering.remove`."""
        return self.steering.remove(feature, **options)

    def sample(
        self, prompt: str, plans: Sequence[Plan | None], **options: Any
    ) -> tuple[Sample, ...]:
        """Continuations of a prompt under every plan (None: unsteered), from the same random
        numbers; see `Steering.sample`."""
        return self.steering.sample(prompt, plans, **options)

    def held_out(self, n_tokens: int) -> HeldOutRows:
        """The first `n_tokens` held-out rows, the same at every site. Raises UserError if there are
        none."""
        return HeldOutRows.of(self.store, n_tokens)

    def lens(self, name: str) -> Finding:
        """What a lens found. Raises UserError that names the command when it did not look yet, or
        looked at other artifacts."""
        artifact = open_finding(self.root, name)
        self._check_together({name: artifact}, fix=Command("lens", name))
        return read_finding(artifact)

    def trace(self, prompt: str, **options: Any) -> Trace:
        """Why the model goes on as it does after a prompt, or why a feature is active on one of its
        tokens (`feature="L20/316@5"`); options are those of `pipeline.trace.prompt.iter_prompt`.
        Raises UserError."""
        return trace_prompt(self, prompt, **options)

    def kept_trace(self, name: str) -> Document:
        """A trace that was kept in the run's folder `traces/`. Raises UserError when there is none
        of this name, or when it was made from other artifacts."""
        artifact = open_trace(self.root, name)
        fix = Command("trace", str(artifact.config.get("prompt", "PROMPT")))
        self._check_together({name: artifact}, fix=fix)
        return read_document(artifact)

    def _open(self, stage: str) -> Artifact:
        if stage not in self._opened and self._given is None:
            path = self.root / stage
            self._opened[stage] = Artifact.open(path, kind=stage, schema=SCHEMAS[stage])
        if stage not in self._opened:
            what = f"the {stage} artifact was not handed over"
            raise UserError(what, where=str(self.root), found=", ".join(self._opened))
        return self._opened[stage]

    def _check_together(self, artifacts: Mapping[str, Artifact], *, fix: Fix) -> None:
        if problems := tuple(misfits(self._with_what_is_beneath(artifacts))):
            raise UserError(
                "these artifacts do not belong together: a stage was made anew and those after it "
                "were not",
                problems=problems,
                fix=fix,
            )

    def _with_what_is_beneath(self, artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
        """These and all that they were made from, as far as it is here."""
        found, waiting = dict(artifacts), list(artifacts.values())
        while waiting:
            for name in waiting.pop().inputs:
                if name not in found:
                    try:  # missing or damaged: an error only for who needs it
                        stage = name in SCHEMAS
                        found[name] = self._open(name) if stage else open_finding(self.root, name)
                    except UserError:
                        continue
                    waiting.append(found[name])
        return found


def misfits(artifacts: Mapping[str, Artifact]) -> Iterator[Problem]:
    """Every artifact that was made from another one than that of the same stage among these."""
    for artifact in artifacts.values():
        for stage, digest in artifact.inputs.items():
            if stage in artifacts and artifacts[stage].digest != digest:
                yield Problem(
                    what=f"made from another {stage} artifact",
                    where=str(artifact.path),
                    expected=f"{artifacts[stage].digest[:12]}, that of {artifacts[stage].path}",
                    found=digest[:12],
                )
