"""What linking reads besides dictionaries: held-out activations from a store, and what the
dictionaries say about themselves.

The rows travel to other processes as a path and a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.store import ActivationStore
from featureflow.errors import Problem, UserError
from featureflow.sites import Site, parse_site
from pipeline.saes import Saes
from sae import Sae

_BLOCK_ROWS = 2048


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
    if isinstance(dictionaries, Saes):
        return dictionaries.description(site)["metadata"]
    return dictionaries[site].metadata
