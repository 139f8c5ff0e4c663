"""Which dictionaries are measured: those of a train artifact, and any others that the user points at.

A dictionary of another library must say its site in its own files, as most do (sae/formats); it is loaded when needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.sites import Site, parse_site
from data.store import ActivationStore
from pipeline.artifact import Artifact
from sae import Sae
from sae.errors import Problem, UserError
from sae.formats import find, read

TRAINED = "train"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A dictionary to measure, not yet loaded. `source` tells dictionaries of one site apart."""

    site: Site
    source: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.site.short} ({self.source})"

    def load(self, device: str) -> Sae:
        return read(self.path).to(device)


def find_candidates(train: Artifact, others: Sequence[str], store: ActivationStore) -> list[Candidate]:
    """The trained dictionaries and those in `others`. Raises UserError with all that have no site in the store."""
    folder = train.path / "dictionaries"
    trained = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    candidates = [Candidate(site=parse_site(path.name), source=TRAINED, path=path) for path in trained]
    problems = []
    for root in map(Path, others):
        found = list(find(root))
        if not found:
            problems.append(Problem(what="no dictionary here", where=str(root)))
        for path, _ in found:
            site = read(path).metadata.get("site")
            if site is None:
                problems.append(Problem(what="the dictionary does not say its site", where=str(path)))
            else:
                inside = path.relative_to(root).as_posix()
                source = root.name if inside == "." else f"{root.name}/{inside}"
                candidates.append(Candidate(site=parse_site(site), source=source, path=path))
    problems += [
        Problem(what="the store has no such site", where=str(c.path), found=c.site.name)
        for c in candidates
        if c.site not in store.sites
    ]
    if problems or not candidates:
        raise UserError("dictionaries that cannot be measured", problems=tuple(problems), mend="featureflow train")
    return sorted(candidates, key=lambda c: (c.site, c.source != TRAINED, c.source))
