"""Where linking gets its inputs: dictionaries read one at a time from a folder, held-out activations from a store.

A recipe of 30 layers × 16k latents holds 30 GB of dictionaries; links need two of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.sites import Site, parse_site
from data.store import ActivationStore
from pipeline.flow.pairing import depth_of
from sae import Sae, load_sae
from sae.errors import UserError

_BLOCK_ROWS = 2048


class DictionaryFolder(Mapping[Site, Sae]):
    """The dictionaries under `<folder>/<site short name>/`, loaded at each access and not kept."""

    def __init__(self, folder: Path) -> None:
        found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        self._paths = dict(
            sorted(((parse_site(path.name), path) for path in found), key=lambda item: depth_of(item[0]))
        )
        if not self._paths:
            raise UserError("there are no dictionaries here", where=str(folder), mend="featureflow train")

    def __getitem__(self, site: Site) -> Sae:
        return load_sae(self._paths[site])

    def __iter__(self) -> Iterator[Site]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def held_out_from(store: ActivationStore, n_tokens: int) -> Callable[[Site], Iterator[Float[Tensor, "token d_in"]]]:
    """Batches of the first `n_tokens` validation rows, the same tokens at every site. Raises UserError if none."""
    rows = store.kept_rows("validation")[:n_tokens]
    if not len(rows):
        raise UserError(
            "the store has no held-out rows",
            where=str(store.url),
            expected="a validation split",
            mend="set collect.validation_fraction above 0 and collect again, or set link.functional_tokens to 0",
        )

    def batches(site: Site) -> Iterator[Float[Tensor, "token d_in"]]:
        for start in range(int(rows[0]), int(rows[-1]) + 1, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, int(rows[-1]) + 1)
            inside = rows[(rows >= start) & (rows < stop)] - start
            if len(inside):
                yield torch.from_numpy(np.ascontiguousarray(store.read(site, start, stop)[inside]))

    return batches
