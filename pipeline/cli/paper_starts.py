"""`featureflow paper starts`: train dictionaries from each start at a few neighbouring layers,
compare their links.

1. The training section of the recipe's `train` artifact is taken over, at `--layers` neighbouring
   residual sites in the middle of the model; every start gets the same total of optimizer steps (a
   chain's first dictionary gets what its short successors leave).
2. The three train artifacts are made under `<recipe>/paper/dictionaries/<start>` by the train
   stage, and kept.
3. `pipeline/lenses/paper/starts.py` compares matchers on them; the result is an artifact too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureflow.errors import Command, UserError

if TYPE_CHECKING:
    from data.store import ActivationStore
    from pipeline.artifact import Artifact
    from pipeline.context import RunContext
    from pipeline.lenses.paper.starts import Start
    from pipeline.lenses.paper.subject import Effort
    from pipeline.run import Run
    from pipeline.stages import train

NAME, SCHEMA = "starts", 1
FEWEST_LAYERS = 2


def make_starts(
    opened: Run, effort: Effort, *, n_layers: int, steps: int, force: bool = False
) -> Artifact:
    """The artifact of the comparison, made if it is not there. Raises UserError."""
    from pipeline.artifact import Artifact, digest_of
    from pipeline.cli.paper_tokens import contexts_of, rows_after_contexts
    from pipeline.flow.sources import HeldOutRows
    from pipeline.lenses.paper import write_finding
    from pipeline.lenses.paper.starts import compare_starts

    made_from, root, context = opened.need("collect", "train"), opened.root, opened.context
    collect, store = made_from["collect"], opened.store
    configs = _training_configs(made_from["train"], store, n_layers=n_layers, steps=steps)
    folder = root / "paper" / "dictionaries"
    trained = {
        name: _trained(config, collect, folder / name, context) for name, config in configs.items()
    }
    digests = {"collect": collect.digest} | {
        name: artifact.digest for name, artifact in trained.items()
    }
    kind, out = f"paper-{NAME}", root / "paper" / NAME
    fields = effort.model_dump() | {"n_layers": n_layers, "steps": steps}
    if force or not Artifact.is_current(out, digest_of(kind, SCHEMA, fields, digests)):
        with Artifact.create(out, kind=kind, schema=SCHEMA, config=fields, inputs=digests) as draft:
            finding = compare_starts(
                [
                    _start(name, artifact, store, context, effort)
                    for name, artifact in trained.items()
                ],
                held_out=HeldOutRows(url=store.url, rows=rows_after_contexts(store, effort)),
                open_model=lambda: opened.model,
                contexts=contexts_of(store),
                effort=effort,
                progress=context.progress,
            )
            write_finding(finding, draft.path)
            draft.summary.update(finding.summary)
    return Artifact.open(out, kind=kind, schema=SCHEMA, fix=Command("paper", NAME))


def _training_configs(
    recipe: Artifact, store: ActivationStore, *, n_layers: int, steps: int
) -> dict[str, train.Config]:
    """What is trained for each start: the recipe's own choices but for sites, steps and start.
    Raises UserError."""
    from pydantic import TypeAdapter

    from pipeline.stages import train
    from pipeline.training.plan import Chain, Independent, Shared

    base: train.Config = TypeAdapter(train.Config).validate_python(dict(recipe.config))
    sites = _middle_sites(store, n_layers)
    if steps < len(sites):
        raise UserError(
            "too few steps to share out",
            where="--steps",
            expected=str(len(sites)),
            found=str(steps),
        )
    next_steps = max(1, steps // 4)
    base = base.replace(sites=sites, steps=steps, overrides=(), imported=None)
    first = steps * len(sites) - next_steps * (len(sites) - 1)
    return {
        "independent": base.replace(initialisation=Independent()),
        "shared": base.replace(initialisation=Shared()),
        "chain": base.replace(initialisation=Chain(next_steps=next_steps), steps=first),
    }


def _middle_sites(store: ActivationStore, n_layers: int) -> tuple[str, ...]:
    layers = sorted(site.layer for site in store.sites if site.kind == "resid_post")
    if not FEWEST_LAYERS <= n_layers <= len(layers):
        raise UserError(
            "the store has not so many residual layers",
            where="--layers",
            expected=f"{FEWEST_LAYERS} to {len(layers)}",
            found=str(n_layers),
        )
    first = (len(layers) - n_layers) // 2
    return tuple(f"L{layer}" for layer in layers[first : first + n_layers])


def _trained(config: train.Config, collect: Artifact, out: Path, context: RunContext) -> Artifact:
    """The train artifact of one start, made if it is not there."""
    from pipeline.artifact import Artifact, digest_of
    from pipeline.stages import train

    if Artifact.is_current(
        out, digest_of(train.KIND, train.SCHEMA, config, {"collect": collect.digest})
    ):
        return Artifact.open(out, kind=train.KIND, schema=train.SCHEMA)
    return train.run(config, train.Inputs(collect=collect), out, context)


def _start(
    name: str, artifact: Artifact, store: ActivationStore, context: RunContext, effort: Effort
) -> Start:
    from pipeline.lenses.paper.starts import Start
    from pipeline.saes import FOLDER, Saes
    from pipeline.stages.link import trained_start_nulls

    dictionaries = Saes(artifact.path / FOLDER, n_kept=0)
    nulls: Mapping[Any, Any] = trained_start_nulls(
        dictionaries, store, context, n_per_relation=1, seed=effort.seed
    )
    return Start(name=name, dictionaries=dictionaries, inertia=nulls.get("residual"))
