"""Which SAEs are measured: those of a train artifact, and any others that the user points at.

`source` tells them apart: `train` (what the later stages use), `variants/<name>` (the others of a
sweep), `transcoders`, or the folder of a foreign one. An SAE of another library must say its site
in its own files, as most do (sae/formats); it is loaded when needed. One whose description names a
site that it `reads` is a transcoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from typing_extensions import Doc

from data.cache import readable_digest
from featureflow.errors import Command, Problem, UserError
from featureflow.sites import Site, parse_site
from pipeline.run import Run
from sae import Sae
from sae.formats import find, read

TRAINED = "train"
Others = Annotated[
    tuple[str, ...],
    Doc("folders with further dictionaries, of any format, measured on the same rows"),
]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An SAE to measure, not yet loaded. `source` tells SAEs of one site apart; `reads` is the
    input site of a transcoder."""

    site: Site
    source: str
    path: Path
    reads: Site | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What names it in a table."""
        return {
            "name": f"{self.site.short} ({self.source})",
            "site": self.site.short,
            "layer": self.site.layer,
            "kind": self.site.kind,
            "source": self.source,
            "reads": None if self.reads is None else self.reads.short,
        }

    def load(self, device: str) -> Sae:
        return read(self.path).to(device)


def find_candidates(run: Run, others: Sequence[str]) -> list[Candidate]:
    """The trained SAEs and those in `others`. Raises UserError with all that have no site in the
    store."""
    candidates: list[Candidate] = _trained(run.artifact("train").path)
    problems: list[Problem] = []
    for root in map(Path, others):
        found = [_foreign(path, root) for path, _ in find(root)]
        if not found:
            problems.append(Problem(what="no dictionary here", where=str(root)))
        candidates += [each for each in found if isinstance(each, Candidate)]
        problems += [each for each in found if isinstance(each, Problem)]
    problems += [
        Problem(what="the store has no such site", where=str(c.path), found=site.name)
        for c in candidates
        for site in (c.site, c.reads)
        if site is not None and site not in run.store.sites
    ]
    if problems or not candidates:
        raise UserError(
            "dictionaries that cannot be measured",
            problems=tuple(problems),
            fix=Command("run", to="train"),
        )
    return sorted(candidates, key=lambda c: (c.site, c.source != TRAINED, c.source))


def digests_of_others(folders: Sequence[str]) -> dict[str, str]:
    """The files of `others`: a result depends on them too."""
    return {
        f"other:{folder}": "-".join(
            readable_digest(file)[:16] for file in sorted(Path(folder).rglob("*")) if file.is_file()
        )
        for folder in folders
    }


def used_later(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of SAEs that later stages use; all, where there are none of those."""
    used = rows["source"] == TRAINED
    return rows[used] if used.any() else rows


def _trained(folder: Path) -> list[Candidate]:
    """Every SAE of a train artifact, from its description alone."""
    candidates = []
    for part in ("dictionaries", "variants", "transcoders"):
        for description in sorted((folder / part).rglob("sae.json")):
            place = description.parent
            source = TRAINED
            if part != "dictionaries":
                source = place.parent.relative_to(folder).as_posix()
            reads = _read_site(description) if part == "transcoders" else None
            site = parse_site(place.name)
            candidates.append(Candidate(site=site, source=source, path=place, reads=reads))
    return candidates


def _foreign(path: Path, root: Path) -> Candidate | Problem:
    """An SAE in a folder of the user's, by what it says of itself."""
    metadata = read(path).metadata
    if metadata.get("site") is None:
        return Problem(what="the dictionary does not say its site", where=str(path))
    if metadata.get("transcodes") and "reads" not in metadata:
        hook = metadata.get("hooks", {}).get("reads")
        what = "the transcoder does not say a site here that it reads"
        return Problem(what=what, where=str(path), found=hook)
    inside = path.relative_to(root).as_posix()
    return Candidate(
        site=parse_site(metadata["site"]),
        source=root.name if inside == "." else f"{root.name}/{inside}",
        path=path,
        reads=parse_site(metadata["reads"]) if metadata.get("reads") else None,
    )


def _read_site(description: Path) -> Site:
    """The input site that a transcoder's description names."""
    try:
        return parse_site(json.loads(description.read_text(encoding="utf-8"))["metadata"]["reads"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the transcoder does not say what it reads",
            where=str(description),
            fix=Command("train", force=True),
        ) from error
