"""Which dictionaries are measured: those of a train artifact, and any others that the user points
at.

`source` tells them apart: `train` (what the later stages use), `variants/<name>` (the others of a
sweep), `transcoders`, or the folder of a foreign one. A dictionary of another library must say its
site in its own files, as most do (sae/formats); it is loaded when needed. One whose description
names a site that it `reads` is a transcoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.store import ActivationStore
from featureflow.errors import Command, Problem, UserError
from featureflow.sites import Site, parse_site
from pipeline.artifact import Artifact
from sae import Sae
from sae.formats import find, read

TRAINED = "train"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A dictionary to measure, not yet loaded. `source` tells dictionaries of one site apart;
    `reads` is the input site of a transcoder."""

    site: Site
    source: str
    path: Path
    reads: Site | None = None

    @property
    def name(self) -> str:
        return f"{self.site.short} ({self.source})"

    def load(self, device: str) -> Sae:
        return read(self.path).to(device)


def find_candidates(
    train: Artifact, others: Sequence[str], store: ActivationStore
) -> list[Candidate]:
    """The trained dictionaries and those in `others`. Raises UserError with all that have no site
    in the store."""
    candidates = _trained(train.path)
    problems = []
    for root in map(Path, others):
        found = list(find(root))
        if not found:
            problems.append(Problem(what="no dictionary here", where=str(root)))
        for path, _ in found:
            metadata = read(path).metadata
            site = metadata.get("site")
            if site is None:
                problems.append(
                    Problem(what="the dictionary does not say its site", where=str(path))
                )
            elif metadata.get("transcodes") and "reads" not in metadata:
                hook = metadata.get("hooks", {}).get("reads")
                what = "the transcoder does not say a site here that it reads"
                problems.append(Problem(what=what, where=str(path), found=hook))
            else:
                inside = path.relative_to(root).as_posix()
                source = root.name if inside == "." else f"{root.name}/{inside}"
                reads = parse_site(metadata["reads"]) if metadata.get("reads") else None
                candidates.append(
                    Candidate(site=parse_site(site), source=source, path=path, reads=reads)
                )
    problems += [
        Problem(what="the store has no such site", where=str(c.path), found=site.name)
        for c in candidates
        for site in (c.site, c.reads)
        if site is not None and site not in store.sites
    ]
    if problems or not candidates:
        raise UserError(
            "dictionaries that cannot be measured",
            problems=tuple(problems),
            fix=Command("run", to="train"),
        )
    return sorted(candidates, key=lambda c: (c.site, c.source != TRAINED, c.source))


def _trained(folder: Path) -> list[Candidate]:
    """Every dictionary of a train artifact, from its description alone."""
    candidates = []
    for description in sorted(folder.glob("dictionaries/*/sae.json")) + sorted(
        path for part in ("variants", "transcoders") for path in (folder / part).rglob("sae.json")
    ):
        place = description.parent
        source = place.parent.relative_to(folder).as_posix()
        candidates.append(
            Candidate(
                site=parse_site(place.name),
                source=TRAINED if source == "dictionaries" else source,
                path=place,
                reads=_reads(description) if source == "transcoders" else None,
            )
        )
    return candidates


def _reads(description: Path) -> Site:
    """The input site that a transcoder's description names."""
    try:
        return parse_site(json.loads(description.read_text(encoding="utf-8"))["metadata"]["reads"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the transcoder does not say what it reads",
            where=str(description),
            fix=Command("train", force=True),
        ) from error
