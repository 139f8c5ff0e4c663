"""Dictionaries whose latents write into many layers: cross-layer transcoders and crosscoders whose
layers encode for themselves.

With `x_l` the activation at the site that layer l reads, and y_o at the site that is written:

    1. z_l = activation_l(W_enc_l x_l + b_enc_l)                  each layer by itself
    2. ŷ_o = Σ_l z_l · W_dec_l[:, o] + b_dec_o (+ W_skip_o x_o)    summed over all that write into o

A transcoder's layer writes into its own and later ones (`first` is l), a crosscoder's into all.
Sources: Ameisen et al. 2025 (circuit tracing); Lindsey et al. 2024 (crosscoders). Cost: one product
of `token × d × latent` for each layer, and one of `token × latent × d` for each pair of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.sites import Site
from sae.activations import Activation, tensors_of


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossLayerPart:
    """What one layer has. `W_dec[:, j]` writes into the output `first + j`."""

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, "latent"]
    W_dec: Float[Tensor, "latent output d_out"]
    activation: Activation
    first: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossLayer:
    """All layers together; `reads[l]` and `writes[l]` are the sites of part l. Raises UserError
    with every misfit."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    parts: tuple[CrossLayerPart, ...]
    b_dec: tuple[Float[Tensor, "d_out"], ...]
    W_skip: tuple[Float[Tensor, "d_out d_in"] | None, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := tuple(_problems_of(self)):
            raise UserError("these tensors do not make a cross-layer dictionary", problems=problems)

    @property
    def n_latents(self) -> int:
        return sum(len(part.b_enc) for part in self.parts)

    @torch.no_grad()
    def encode(
        self, x: Mapping[Site, Float[Tensor, "token d_in"]]
    ) -> list[Float[Tensor, "token latent"]]:
        """The latents of every layer, from the activations at `reads`."""
        return [
            part.activation(F.linear(x[site].to(part.W_enc), part.W_enc, part.b_enc))
            for site, part in zip(self.reads, self.parts, strict=True)
        ]

    def decode(
        self, z: Sequence[Float[Tensor, "token latent"]]
    ) -> dict[Site, Float[Tensor, "token d_out"]]:
        """What the latents write, by site; the linear part of a skip transcoder is not in it."""
        out = {site: self.b_dec[o].expand(len(z[0]), -1) for o, site in enumerate(self.writes)}
        for latents, part in zip(z, self.parts, strict=True):
            for j in range(part.W_dec.shape[1]):
                site = self.writes[part.first + j]
                out[site] = out[site] + latents @ part.W_dec[:, j]
        return out

    @torch.no_grad()
    def __call__(
        self, x: Mapping[Site, Float[Tensor, "token d_in"]]
    ) -> dict[Site, Float[Tensor, "token d_out"]]:
        """Encode and decode; the prediction at every site of `writes`."""
        out = self.decode(self.encode(x))
        for read, site, skip in zip(self.reads, self.writes, self.W_skip, strict=True):
            if skip is not None:
                out[site] = out[site] + F.linear(x[read].to(skip), skip)
        return out

    def rows(self, layer: int, into: int) -> Float[Tensor, "latent d_out"]:
        """The decoder rows of a layer's latents into one output; zeros where it writes nothing."""
        part = self.parts[layer]
        if 0 <= into - part.first < part.W_dec.shape[1]:
            return part.W_dec[:, into - part.first]
        return part.W_dec.new_zeros(len(part.b_enc), len(self.b_dec[into]))

    def virtual_weights(
        self, source: int, target: int, *, latents: Sequence[int] | None = None
    ) -> Float[Tensor, "source target"]:
        """What one unit of a source latent adds to the pre-activations of the target's latents. A
        transcoder's latents do it by way of the residual stream: all that they write before the
        target reads. A crosscoder's write the target's site itself. For sites after a norm this is
        in units of the normalised stream."""
        chosen = slice(None) if latents is None else list(latents)
        read = self.reads[target]
        into = [o for o, site in enumerate(self.writes) if site == read] or [
            o for o, site in enumerate(self.writes) if site < read
        ]
        written = torch.zeros_like(self.rows(source, source)[chosen])
        for o in into:
            written = written + self.rows(source, o)[chosen]
        return written @ self.parts[target].W_enc.T


def _problems_of(whole: CrossLayer) -> Iterator[Problem]:
    n = len(whole.reads)
    for name in ("writes", "parts", "b_dec", "W_skip"):
        if len(getattr(whole, name)) != n:
            found = str(len(getattr(whole, name)))
            yield Problem(what="not one a layer", where=name, expected=str(n), found=found)
            return
    for layer, part in enumerate(whole.parts):
        n_latents = len(part.W_enc)
        outputs = part.W_dec.shape[1] if part.W_dec.ndim == 3 else -1
        expected: dict[str, tuple[int, ...]] = {
            "b_enc": (n_latents,),
            "W_dec": (n_latents, outputs, len(whole.b_dec[layer])),
        }
        found_tensors = {"b_enc": part.b_enc, "W_dec": part.W_dec}
        for name, tensor in tensors_of(part.activation).items():
            expected[f"activation.{name}"], found_tensors[f"activation.{name}"] = (
                (n_latents,),
                tensor,
            )
        for name, shape in expected.items():
            if tuple(found_tensors[name].shape) != shape:
                yield Problem(
                    what="shape",
                    where=f"layer {layer}: {name}",
                    expected=str(list(shape)),
                    found=str(list(found_tensors[name].shape)),
                )
        if outputs > 0 and part.first + outputs > n:
            yield Problem(
                what="decoders into more layers than there are",
                where=f"layer {layer}: W_dec",
                expected=f"at most {n - part.first}",
                found=str(outputs),
            )
