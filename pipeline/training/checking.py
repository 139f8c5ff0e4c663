"""One dictionary's files → what they are, and how well it does on a model's activations.

1. Read the files; what they say becomes rows of a table: format, site and input, model, scale and
   conventions, activation, the published L0, and everything that they leave open.
2. With a model: run it over text, encode what the dictionary reads, and compare with what it is to
   reconstruct. L0 is the mean number of active latents, FVU the squared error over the variance
   about the mean; the first position of every context (BOS) is left out. An L0 far from the
   published one, or an FVU near 1, means another site, scale or convention.
3. A folder of a cross-layer transcoder or crosscoder is read whole (sae/cross_layer.py) and
   measured at every site that it writes, with all layers that write there.
4. Where it is open whether the stream was centred, both are measured.

Cost: reading the file, and one forward pass of `n_tokens` up to the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data.model.language_model import LanguageModel
from data.text.corpus import BundledText, CorpusSpec
from data.text.packing import pack_corpus
from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.training.imported import same_model
from sae import Sae
from sae.formats import Conventions, read, read_cross_layer
from sae.formats.conventions import OPEN
from sae.formats.cross_layer import is_cross_layer
from sae.formats.normalised import NormalisedSae

_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is known of a dictionary; `measured` has one row for each reading that was tried."""

    described: Mapping[str, Any]
    notes: tuple[str, ...]
    measured: tuple[Mapping[str, Any], ...] = ()


def check_dictionary(
    path: Path,
    *,
    format: str = "auto",
    conventions: Conventions | None = None,
    site: Site | None = None,
    reads: Site | None = None,
    model: LanguageModel | None = None,
    text: CorpusSpec | None = None,
    n_tokens: int = 4096,
    n_context: int = 128,
) -> Check:
    """`site` and `reads` are needed where the files do not say them. Raises UserError for files
    that cannot be read, and for a site or a model that contradicts them."""
    if path.is_dir() and is_cross_layer(path):
        return _check_cross_layer(path, model, text or BundledText(), n_tokens, n_context)
    conventions = conventions or Conventions()
    sae = read(path, format=format, conventions=conventions)
    described = describe_dictionary(sae)
    notes = tuple(sae.metadata.get("notes", ()))
    if model is None:
        return Check(described=described, notes=notes)
    site, reads = _places(sae, site, reads)
    said = sae.metadata.get("model")
    if said and not same_model(said, model.name):
        notes = (*notes, f"made for {said}, measured on {model.name}")
    seen = _activations(model, (reads, site), text or BundledText(), n_tokens, n_context)
    x, y = seen[reads], seen[site]
    if (sae.d_in, sae.d_out) != (x.shape[1], y.shape[1]):
        raise UserError(
            "the dictionary does not fit the model",
            where=str(path),
            expected=f"width {x.shape[1]} in, {y.shape[1]} out",
            found=f"width {sae.d_in} in, {sae.d_out} out",
        )
    readings = {"as read": sae}
    if "centred" in sae.metadata.get(OPEN, ()):
        asked = conventions.replace(centred=True)
        readings = {"not centred": sae, "centred": read(path, format=format, conventions=asked)}
    measured = tuple({"reading": name, **_measured(each, x, y)} for name, each in readings.items())
    return Check(described=described, notes=notes, measured=measured)


def describe_dictionary(sae: Sae) -> dict[str, Any]:
    """What a dictionary is, in the order in which one wants to know it."""
    metadata = sae.metadata
    hooks = metadata.get("hooks", {})
    source = metadata.get("source", {})
    activation = sae.activation.kind
    if k := getattr(sae.activation, "k", None):
        activation += f", k = {k}"
    found = {
        "format": source.get("format", "featureflow"),
        "kind": "transcoder" if metadata.get("reads") or metadata.get("transcodes") else "SAE",
        "site": metadata.get("site") or hooks.get("writes") or "not said",
        "reads": metadata.get("reads") or hooks.get("reads"),
        "model": metadata.get("model") or "not said",
        "latents": sae.n_latents,
        "width": f"{sae.d_in} in, {sae.d_out} out",
        "activation": activation,
        "normalisation": sae.normalisation.kind if isinstance(sae, NormalisedSae) else None,
        "centred stream": "folded" if "conventions" in metadata else None,
        "skip connection": "yes" if sae.W_skip is not None else None,
        "unit decoder rows": "yes" if metadata.get("unit_decoder", True) else "no",
        "published L0": metadata.get("published", {}).get("l0"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _places(sae: Sae, site: Site | None, reads: Site | None) -> tuple[Site, Site]:
    """The site that is reconstructed and the one that is read."""
    metadata = sae.metadata
    said = parse_site(metadata["site"]) if "site" in metadata else None
    if site is None and said is None:
        raise UserError(
            "the file does not say its site",
            found=metadata.get("hooks", {}).get("writes"),
            fix="name it: --site L12",
        )
    if site is not None and said is not None and site != said:
        raise UserError("the file says another site", expected=site.name, found=said.name)
    site = site or said
    assert site is not None
    if not metadata.get("transcodes") and "reads" not in metadata:
        return site, site
    source = parse_site(metadata["reads"]) if "reads" in metadata else reads
    if source is None:
        raise UserError(
            "the transcoder does not say what it reads",
            found=metadata.get("hooks", {}).get("reads"),
            fix="name it: --reads L12.mlp_in",
        )
    return site, source


def _check_cross_layer(
    path: Path, model: LanguageModel | None, text: CorpusSpec, n_tokens: int, n_context: int
) -> Check:
    """One row of measurements for every site that is written; its L0 is that of its own layer."""
    whole = read_cross_layer(path)
    described = {
        "format": "cross_layer",
        "kind": "crosscoder" if whole.reads == whole.writes else "cross-layer transcoder",
        "reads": ", ".join(site.short for site in whole.reads),
        "sites": ", ".join(site.short for site in whole.writes),
        "model": whole.metadata["model"] or "not said",
        "latents": whole.n_latents,
        "published L0": whole.metadata["published"]["l0"] or "not said",
    }
    if model is None:
        return Check(described=described, notes=())
    sites = tuple(dict.fromkeys((*whole.reads, *whole.writes)))
    seen = _activations(model, sites, text, n_tokens, n_context)
    z, out = whole.encode(seen), whole(seen)
    measured = [
        {
            "reading": site.short,
            "n_tokens": len(latents),
            "L0": float((latents > 0).sum() / len(latents)),
            "FVU": _fvu(float((out[site].double() - seen[site]).square().sum()), seen[site]),
        }
        for site, latents in zip(whole.writes, z, strict=True)
    ]
    return Check(described=described, notes=(), measured=tuple(measured))


def _activations(
    model: LanguageModel, sites: Sequence[Site], text: CorpusSpec, n_tokens: int, n_context: int
) -> dict[Site, Float[Tensor, "token width"]]:
    """Activations on text, without the first position of each context."""
    packed = pack_corpus(
        text, model.tokenizer, n_context=min(n_context, model.n_context), n_tokens=n_tokens, seed=0
    )
    sites = tuple(dict.fromkeys(sites))
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for first in range(0, packed.n_contexts, _BATCH):
        ids = torch.from_numpy(packed.contexts(first, first + _BATCH))
        for site, values in model.activations(ids, sites).items():
            parts[site].append(values[:, 1:].flatten(0, 1).float().cpu())
    return {site: torch.cat(values) for site, values in parts.items()}


def _measured(sae: Sae, x: Tensor, y: Tensor) -> dict[str, float]:
    error = active = 0.0
    for rows, wanted in zip(x.split(1024), y.split(1024), strict=True):
        error += float((sae(rows).double() - wanted.double()).square().sum())
        active += float((sae.encode_sparse(rows).value > 0).sum())
    return {"n_tokens": len(x), "L0": active / len(x), "FVU": _fvu(error, y)}


def _fvu(error: float, y: Tensor) -> float:
    centred = y.double() - y.double().mean(0)
    return error / max(float(centred.square().sum()), 1e-300)
