"""The inference form of a sparse autoencoder: raw activations in, latents out, and back.

Whatever it was trained as, a dictionary is used in one form. With `x` a raw activation (any input
scale is folded):

    1. pre = W_enc (x − b_in) + b_enc
    2. z   = activation(pre)                        sae/activations.py
    3. x̂   = Σ_i z_i W_dec[i] + b_dec (+ W_skip x for a skip transcoder)

The rows of `W_dec` have unit length, so a latent is measured in units of the activation it adds.
Encoding costs one product of `token × d_in × latent`; it runs over blocks of tokens so that no more
than `_BLOCK_BYTES` of pre-activations exist at a time in the sparse functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.errors import Problem, UserError
from sae.activations import Activation, TopKActivation, tensors_of, with_tensors
from sae.kernels.select import largest_of_rows
from sae.selected import MOST_SELECTED, selected_of_topk

_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseCodes:
    """Latents of some tokens, a few slots per token. A slot with value 0 is empty; its index is
    some other latent.

    The indices of one token are distinct, in no promised order.
    """

    index: Int[Tensor, "*token k"]
    value: Float[Tensor, "*token k"]
    n_latents: int

    def dense(self) -> Float[Tensor, "*token latent"]:
        """All latents, zeros included."""
        shape = (*self.value.shape[:-1], self.n_latents)
        return self.value.new_zeros(shape).scatter_(-1, self.index, self.value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sae:
    """A dictionary over the activations of one site. Immutable; `replace` and `to` make changed
    copies.

    `b_in` is subtracted before encoding. `W_skip` is None except for skip transcoders. `metadata`
    is plain JSON: `site`, `initialisation`, how it was trained. Raises UserError with every misfit
    between the shapes.
    """

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, "latent"]
    W_dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, "d_out"]
    b_in: Float[Tensor, "d_in"]
    activation: Activation
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := tuple(_problems_of(self)):
            raise UserError("these tensors do not make a dictionary", problems=problems)

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def pre_activations(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        """`W_enc (x − b_in) + b_enc`, in the dictionary's dtype whatever the dtype of `x`."""
        return F.linear(x.to(self.device, self.dtype) - self.b_in, self.W_enc, self.b_enc)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        """All latents, dense: `token × latent` numbers. For many tokens prefer `encode_sparse`."""
        return self.activation(self.pre_activations(x))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*token d_in"]) -> SparseCodes:
        """The active latents only: k slots per token for TopK, else as many as the busiest token
        needs."""
        flat = x.reshape(-1, x.shape[-1])
        parts = [self._sparse_block(block) for block in self._blocks(flat)]
        width = max((value.shape[1] for _, value in parts), default=1)
        index = torch.cat([_widen_index(index, width, self.n_latents) for index, _ in parts])
        value = torch.cat([F.pad(value, (0, width - value.shape[1])) for _, value in parts])
        lead = x.shape[:-1]
        return SparseCodes(
            index=index.view(*lead, width), value=value.view(*lead, width), n_latents=self.n_latents
        )

    @torch.no_grad()
    def encode_selected(
        self, x: Float[Tensor, "*token d_in"], latents: Sequence[int] | Int[Tensor, "selected"]
    ) -> Float[Tensor, "*token selected"]:
        """The columns `latents` of `encode(x)`. Elementwise activations compute only those; TopK
        looks at others as far as needed to decide (sae/selected.py)."""
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=self.device)
        if self.activation.is_elementwise:
            narrow = {name: tensor[chosen] for name, tensor in tensors_of(self.activation).items()}
            centred = x.to(self.device, self.dtype) - self.b_in
            pre = F.linear(centred, self.W_enc[chosen], self.b_enc[chosen])
            return with_tensors(self.activation, narrow)(pre)
        blocks = self._blocks(x.reshape(-1, x.shape[-1]))
        if (
            isinstance(self.activation, TopKActivation)
            and len(chosen) <= MOST_SELECTED
            and self.device.type == "cpu"
        ):
            few = [
                selected_of_topk(
                    block.to(self.device, self.dtype) - self.b_in,
                    self.W_enc,
                    self.b_enc,
                    self.activation,
                    chosen,
                )
                for block in blocks
            ]
            return torch.cat(few).view(*x.shape[:-1], len(chosen))
        return torch.cat([self.encode(block)[:, chosen] for block in blocks]).view(
            *x.shape[:-1], len(chosen)
        )

    def decode(
        self, z: Float[Tensor, "*token latent"] | SparseCodes
    ) -> Float[Tensor, "*token d_out"]:
        """The reconstruction that the latents stand for; a skip transcoder's linear part is not in
        it."""
        if not isinstance(z, SparseCodes):
            return z.to(self.device, self.dtype) @ self.W_dec + self.b_dec
        index, value = (
            z.index.reshape(-1, z.index.shape[-1]),
            z.value.reshape(-1, z.value.shape[-1]),
        )
        summed = F.embedding_bag(index, self.W_dec, per_sample_weights=value, mode="sum")
        return (summed + self.b_dec).view(*z.value.shape[:-1], self.d_out)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_out"]:
        """Encode and decode; for a transcoder, the prediction of the other site."""
        out = self.decode(
            self.encode_sparse(x) if not self.activation.is_elementwise else self.encode(x)
        )
        return (
            out
            if self.W_skip is None
            else out + F.linear(x.to(self.device, self.dtype), self.W_skip)
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Sae:
        """A copy with its tensors on another device or in another dtype."""
        return self._map(
            lambda tensor: tensor.to(device=device or self.device, dtype=dtype or self.dtype)
        )

    def replace(self, **changes: Any) -> Sae:
        """A copy with some fields changed; validated anew."""
        return replace(self, **changes)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Sae:
        named: dict[str, Any] = {
            name: change(getattr(self, name))
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_in")
        }
        tensors = {name: change(tensor) for name, tensor in tensors_of(self.activation).items()}
        skip = None if self.W_skip is None else change(self.W_skip)
        return replace(
            self, **named, W_skip=skip, activation=with_tensors(self.activation, tensors)
        )

    def _blocks(self, flat: Float[Tensor, "token d_in"]) -> Iterator[Float[Tensor, "block d_in"]]:
        rows = max(1, _BLOCK_BYTES // (self.n_latents * self.W_enc.element_size()))
        return iter(flat.split(rows))

    def _sparse_block(self, block: Float[Tensor, "block d_in"]) -> tuple[Tensor, Tensor]:
        if isinstance(self.activation, TopKActivation):
            value, index = largest_of_rows(self.pre_activations(block), self.activation.k)
            return index, value.relu()
        z = self.encode(block)
        busiest = int((z != 0).sum(-1).max()) if z.numel() else 1
        value, index = z.topk(max(busiest, 1), dim=-1)
        return index, value


def _widen_index(
    index: Int[Tensor, "token k"], width: int, n_latents: int
) -> Int[Tensor, "token width"]:
    """Fill the slots of a narrower block with latents that the row does not name yet, so that rows
    stay distinct."""
    missing = width - index.shape[1]
    if not missing:
        return index
    used = torch.zeros(index.shape[0], n_latents, dtype=torch.bool, device=index.device).scatter_(
        1, index, True
    )
    spare = used.to(torch.int8).topk(missing, dim=1, largest=False).indices
    return torch.cat([index, spare], dim=1)


def _problems_of(sae: Sae) -> Iterator[Problem]:
    """Every misfit between the tensors' shapes; W_enc and W_dec give the sizes that the others must
    have."""
    for name in ("W_enc", "W_dec"):
        if getattr(sae, name).ndim != 2:
            yield Problem(
                what="not a matrix", where=name, found=str(list(getattr(sae, name).shape))
            )
    if sae.W_enc.ndim != 2 or sae.W_dec.ndim != 2:
        return
    n_latents, d_in, d_out = sae.W_enc.shape[0], sae.W_enc.shape[1], sae.W_dec.shape[1]
    expected = {
        "W_dec": (n_latents, d_out),
        "b_enc": (n_latents,),
        "b_dec": (d_out,),
        "b_in": (d_in,),
    }
    found = {name: getattr(sae, name) for name in expected}
    if sae.W_skip is not None:
        expected["W_skip"], found["W_skip"] = (d_out, d_in), sae.W_skip
    for name, tensor in tensors_of(sae.activation).items():
        expected[f"activation.{name}"], found[f"activation.{name}"] = (n_latents,), tensor
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            yield Problem(
                what="shape",
                where=name,
                expected=str(list(shape)),
                found=str(list(found[name].shape)),
            )
    if isinstance(sae.activation, TopKActivation) and not 1 <= sae.activation.k <= n_latents:
        yield Problem(
            what="k is impossible",
            where="activation.k",
            expected=f"1 … {n_latents}",
            found=str(sae.activation.k),
        )
