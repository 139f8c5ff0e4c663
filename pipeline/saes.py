"""The SAEs of a train artifact, by site, in the order of computation, each read when it is first
asked for.

A run of 30 layers × 16k latents holds tens of gigabytes of SAEs. A consumer that needs two of them
at once takes `saes.keeping(0)`. The mapping travels to other processes as a path and a few words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from featureflow.errors import Command, UserError
from featureflow.sites import Site, parse_site
from sae import Sae, load_sae

FOLDER = "dictionaries"
"""Where a train artifact keeps the SAEs that later stages use: `dictionaries/<site>/sae.json`."""

CROSS_LAYER = "cross_layer"
"""Beside it: a dictionary that writes into many layers."""


class Saes(Mapping[Site, Sae]):
    """Site → SAE on `device`. The `n_kept` last ones stay in memory, all of them for None."""

    def __init__(self, folder: Path, *, device: str = "cpu", n_kept: int | None = None) -> None:
        paths = [path.parent for path in folder.glob("*/sae.json")] if folder.is_dir() else []
        if not paths:
            found, fix = None, Command("run", to="train")
            if (folder.parent / CROSS_LAYER).is_dir():
                found, fix = "a cross-layer transcoder, kept whole", Command("lens", "cross-layer")
            what = "there are no dictionaries here"
            raise UserError(what, where=str(folder), found=found, fix=fix)
        by_site = {parse_site(path.name): path for path in paths}
        self.folder = folder
        self._paths = {site: by_site[site] for site in sorted(by_site)}
        self._device = device
        self._n_kept = n_kept
        self._kept: dict[Site, Sae] = {}

    def __getitem__(self, site: Site) -> Sae:
        sae = self._kept.pop(site, None)
        if sae is None:
            sae = load_sae(self._paths[site]).to(torch.device(self._device))
        self._kept[site] = sae
        while self._n_kept is not None and len(self._kept) > self._n_kept:
            self._kept.pop(next(iter(self._kept)))
        return sae

    def __iter__(self) -> Iterator[Site]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, site: object) -> bool:
        return site in self._paths

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def keeping(self, n_kept: int | None, *, device: str | None = None) -> Saes:
        """The same SAEs with another cache, and on another device if one is named."""
        return Saes(self.folder, device=device or self._device, n_kept=n_kept)

    def description(self, site: Site) -> dict[str, Any]:
        """Sizes and metadata without the weights: `n_latents`, `d_out`, `metadata`. The loader
        checks it fully."""
        return json.loads((self._paths[site] / "sae.json").read_text(encoding="utf-8"))
