"""A run in other people's formats, so that their viewers open it.

An export is a function `(run, out, *, feature, site) -> paths written`; `feature` and `site` are
what the user named, or None. It is found by name: those below, and those that packages add under
the entry point group `featureflow.exports`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from featureflow.errors import UserError
from featureflow.plugins import plugins
from pipeline.flow.exports import export_graph
from pipeline.run import Run
from pipeline.site.exports.embedding_atlas import export_embedding_atlas
from pipeline.site.exports.neuronpedia import export_bulk, export_upload_batches

_HOPS, _MOST_NODES = 4, 300  # of an attribution graph around one feature


class Export(Protocol):
    """Writes a run to `out` and says what it wrote. Raises UserError for what it needs."""

    def __call__(
        self, run: Run, out: Path, *, feature: str | None, site: str | None
    ) -> Sequence[Path]: ...


def export_named(name: str) -> Export:
    """Raises UserError with the names there are."""
    known = exports()
    if name not in known:
        raise UserError(f"there is no export {name!r}", where="--to", expected=", ".join(known))
    return known[name]


def exports() -> dict[str, Export]:
    """Every export by name."""
    return {**_OURS, **plugins("exports")}


def _attribution_graph(
    run: Run, out: Path, *, feature: str | None, site: str | None
) -> Sequence[Path]:
    around = _needed(feature, "--feature", "the feature in the middle, such as L12/402")
    size = {"max_hops": _HOPS, "max_nodes": _MOST_NODES}
    return [export_graph(run.graph, out, around=around, labels=run.labels, form=".json", **size)]


def _graph(
    run: Run, out: Path, *, feature: str | None, site: str | None, form: str
) -> Sequence[Path]:
    return [export_graph(run.graph, out, around=feature, labels=run.labels, form=form)]


def _embedding_atlas(
    run: Run, out: Path, *, feature: str | None, site: str | None
) -> Sequence[Path]:
    return [export_embedding_atlas(run.features, run.saes, out)]


def _neuronpedia(
    run: Run, out: Path, *, feature: str | None, site: str | None, write: Callable[..., list[Path]]
) -> Sequence[Path]:
    short = _needed(site, "--site", "the site to export, such as L12")
    name = str(run.features.about["model"]["name"])
    return write(run.features, short, out, model_id=name, source=f"{short}-featureflow")


def _needed(value: str | None, option: str, meaning: str) -> str:
    if value is None:
        raise UserError(f"this export needs {option}", expected=meaning)
    return value


_OURS: dict[str, Export] = {
    "neuronpedia": partial(_neuronpedia, write=export_bulk),
    "neuronpedia-upload": partial(_neuronpedia, write=export_upload_batches),
    "attribution-graph": _attribution_graph,
    "gexf": partial(_graph, form=".gexf"),
    "graphml": partial(_graph, form=".graphml"),
    "embedding-atlas": _embedding_atlas,
}
