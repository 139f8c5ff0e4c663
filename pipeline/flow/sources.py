"""Where linking gets its inputs: dictionaries read one at a time from a folder, held-out
activations from a store.

A recipe of 30 layers × 16k latents holds tens of gigabytes of dictionaries; a pair needs two of
them at once. Both classes travel to other processes as a path and a few numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.store import ActivationStore
from featureflow.errors import Problem, UserError
from featureflow.sites import Site, parse_site
from sae import Sae, load_sae

_BLOCK_ROWS = 2048


class DictionaryFolder(Mapping[Site, Sae]):
    """The dictionaries under `<folder>/<site short name>/`, loaded at each access and not kept."""

    def __init__(self, folder: Path) -> None:
        found = [path.parent for path in folder.glob("*/sae.json")] if folder.is_dir() else []
        sites = sorted(
            ((parse_site(path.name), path) for path in found), key=lambda item: item[0].depth
        )
        if not sites:
            raise UserError(
                "there are no dictionaries here",
                where=str(folder),
                fix="featureflow run --to train",
            )
        self._paths = dict(sites)

    def __getitem__(self, site: Site) -> Sae:
        return load_sae(self._paths[site])

    def __iter__(self) -> Iterator[Site]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def description(self, site: Site) -> dict[str, Any]:
        """Sizes and metadata without the weights: `n_latents`, `d_out`, `metadata`. The loader
        checks it fully."""
        return json.loads((self._paths[site] / "sae.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutRows:
    """The same held-out rows at any site, in batches. A callable, as `link_dictionaries` wants
    it."""

    url: str
    rows: Int64[np.ndarray, "row"]

    @classmethod
    def of(cls, store: ActivationStore, n_tokens: int) -> HeldOutRows:
        """The first `n_tokens` validation rows. Raises UserError if there are none."""
        rows = store.kept_rows("validation")[:n_tokens]
        if not len(rows):
            raise UserError(
                "the store has no held-out rows",
                where=store.url,
                expected="a validation split",
                fix="set collect.validation_fraction above 0, or link.functional_tokens to 0",
            )
        return cls(url=store.url, rows=rows)

    def __call__(self, site: Site) -> Iterator[Float[Tensor, "token d_in"]]:
        store = ActivationStore.open(self.url)
        for start in range(int(self.rows[0]), int(self.rows[-1]) + 1, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, int(self.rows[-1]) + 1)
            begin, end = np.searchsorted(self.rows, (start, stop))
            if end > begin:
                yield torch.from_numpy(store.read(site, start, stop)[self.rows[begin:end] - start])


def facts_of(dictionaries: Mapping[Site, Sae]) -> dict[Site, Mapping[str, Any]]:
    """Metadata by site, checked: one model, each dictionary at its own site. Raises UserError with
    every misfit."""
    facts = {site: _metadata(dictionaries, site) for site in dictionaries}
    problems = []
    for site, metadata in facts.items():
        own = metadata.get("site")
        if isinstance(own, str) and parse_site(own) != site:
            problems.append(
                Problem(
                    what="a dictionary of another site",
                    where=site.short,
                    expected=site.name,
                    found=own,
                )
            )
    models = {
        str(m["model_fingerprint"]): site for site, m in facts.items() if m.get("model_fingerprint")
    }
    if len(models) > 1:
        listed = ", ".join(f"{mark[:12]} ({site.short})" for mark, site in models.items())
        problems.append(
            Problem(
                what="dictionaries of different models", expected="one fingerprint", found=listed
            )
        )
    if problems:
        raise UserError("these dictionaries do not make one flow graph", problems=tuple(problems))
    return facts


def _metadata(dictionaries: Mapping[Site, Sae], site: Site) -> Mapping[str, Any]:
    if isinstance(dictionaries, DictionaryFolder):
        return dictionaries.description(site)["metadata"]
    return dictionaries[site].metadata
