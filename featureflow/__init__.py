"""The front door: what a script, a notebook or a lens needs, each loaded when it is first used.

    import featureflow as ff

    run = ff.Run.open("artifacts/laptop")
    run.graph.chain("L12/402")
    run.sample("I think", [None, run.plan("L12/402", dose=0.3)])

The import itself loads neither torch nor anything else, and refuses to go on where a folder of the
same name hides one of this project's packages.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from featureflow.errors import Problem, UserError
from featureflow.lazy import lazy_names

if TYPE_CHECKING:
    from data.model.language_model import LanguageModel
    from data.store import ActivationStore, DocumentRow, store_modules
    from featureflow.errors import UserError
    from featureflow.sites import FeatureId, Site, parse_feature, parse_site
    from pipeline.artifact import Artifact
    from pipeline.context import RunContext
    from pipeline.describe.features import Features
    from pipeline.findings import Finding
    from pipeline.flow.describe import describe_flow
    from pipeline.flow.exports import export_graph
    from pipeline.flow.graph import FlowGraph
    from pipeline.flow.link import link_dictionaries
    from pipeline.lenses.base import LensConfig
    from pipeline.run import Run
    from pipeline.stages.recipe import read_recipe
    from pipeline.stages.schedule import run_recipe
    from sae.dictionary import Sae
    from sae.formats.native import load_sae, save_sae
    from steering.dose import NeutralText, calibrate
    from steering.generation import Sampling, generate
    from steering.hooks import applied
    from steering.plan import Plan
    from steering.plan_files import read_plan, write_plan

_ROOMS = ("sae", "data", "steering", "pipeline")


def _check_rooms() -> None:
    """Raise UserError when one of this project's packages is hidden by another of its name."""
    problems = []
    for name in _ROOMS:
        own = Path(__file__).parents[1] / name / "__init__.py"
        spec = find_spec(name)
        places = [spec.origin] if spec and spec.origin else spec and spec.submodule_search_locations
        if not places or Path(places[0]).resolve() != own.resolve():
            what = f"another package is found under the name {name!r}"
            found = ", ".join(places) if places else "none"
            problems.append(Problem(what=what, expected=str(own), found=found))
    if problems:
        raise UserError(
            "featureflow's packages are hidden by others",
            problems=tuple(problems),
            fix="start the script with `python -P`, or rename the folder or file beside it",
        )


_check_rooms()
__getattr__, __all__ = lazy_names(__name__, __file__)
