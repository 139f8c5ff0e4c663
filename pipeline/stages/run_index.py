"""The front page of a run: `artifacts/<recipe>/index.html`, with every stage's headline numbers and
figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from featureflow.files import write_text_atomically
from pipeline.artifact import Artifact
from pipeline.console import show_number
from pipeline.lenses.base import find_lens, fitting
from pipeline.run import Run
from pipeline.stages import TITLES
from pipeline.stages.recipe import Recipe

_PAGES = {
    "atlas": ("site/index.html", "browse the atlas"),
    "steer": ("report.html", "read the steering report"),
}


def write_run_index(root: Path, recipe: Recipe, run: Run) -> Path:
    """Write the page beside the artifacts and return its path. All text is escaped; the page asks
    no network."""
    template = Environment(
        loader=PackageLoader("pipeline.stages", "templates"), autoescape=True
    ).get_template("run_index.html")
    artifacts = [*run.artifacts.values()]
    stages = [_section(root, artifact, TITLES[artifact.kind]) for artifact in artifacts]
    after = 1 + max(i for i, a in enumerate(artifacts) if a.kind in ("collect", "train", "link"))
    stages[after:after] = [
        _section(root, finding, find_lens(name).TITLE) for name, finding in fitting(run).items()
    ]
    page = template.render(recipe=recipe, stages=stages, links=[*_links(artifacts)])
    place = root / "index.html"
    write_text_atomically(place, page)
    return place


def _section(root: Path, artifact: Artifact, title: str) -> dict[str, object]:
    place = artifact.path.relative_to(root).as_posix()
    figures = [
        name for name in artifact.files if name.endswith(".png") and not name.startswith("site/")
    ]
    return {
        "place": place,
        "title": title[0].upper() + title[1:],
        "seconds": show_number(artifact.made_by["seconds"]),
        "digest": artifact.digest[:12],
        "summary": [
            (key.replace("_", " "), show_number(value)) for key, value in artifact.summary.items()
        ],
        "figures": [
            {"href": quote(f"{place}/{name}"), "title": Path(name).stem.replace("_", " ")}
            for name in figures
        ],
    }


def _links(artifacts: Sequence[Artifact]) -> list[dict[str, str]]:
    links = []
    for artifact in artifacts:
        page, title = _PAGES.get(artifact.path.name, ("", ""))
        if page in artifact.files:
            links.append({"href": quote(f"{artifact.path.name}/{page}"), "title": title})
    return links
