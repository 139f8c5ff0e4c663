"""The dictionaries of a train artifact, by site, each read when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.artifact import Artifact
from sae import Sae, load_sae

FOLDER = "dictionaries"


class Dictionaries(Mapping[Site, Sae]):
    """Site → dictionary, in the order of the model. A dictionary is kept once read; `dict(…)` reads
    all of them."""

    def __init__(self, folder: Path) -> None:
        names = [path.parent.name for path in folder.glob("*/sae.json")] if folder.is_dir() else []
        if not names:
            raise UserError(
                "there are no dictionaries here",
                where=str(folder),
                fix="featureflow run --to train",
            )
        self._folder = folder
        self._sites = tuple(sorted(map(parse_site, names)))
        self._read: dict[Site, Sae] = {}

    def __getitem__(self, site: Site) -> Sae:
        if site not in self._sites:
            raise KeyError(site)
        if site not in self._read:
            self._read[site] = load_sae(self._folder / site.short)
        return self._read[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def read_dictionaries(artifact: Artifact) -> Dictionaries:
    """The dictionaries of a train artifact. Raises UserError when there are none or one is
    damaged."""
    return Dictionaries(artifact.path / FOLDER)
