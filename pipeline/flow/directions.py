"""Decoder rows → unit directions that can be compared, with what was found on the way.

1. Rows of the decoder become float32 (through `projection` where a dictionary lives before an
   output matrix, as attention dictionaries before W_O do).
2. Rows without a direction (zero norm, not finite) are set aside: they take part in nothing and
   never give a NaN.
3. The rest is scaled to norm one. Duplicate rows are counted, and so is the share of the mean
   direction: in a contaminated dictionary every row leans on one common vector and every cosine is
   high.
4. `reads` are the encoder rows, whitened half by the second moment of the directions (so that what
   all rows share counts little) and scaled so that each reads 1 of its own direction: what a
   latent reads of another's direction is then a share. Directions stand in for an encoder that
   reads another space.

Cost O(latents × d_model). Source: Feature Flow (arXiv 2502.03032) §3.2, which compares unit decoder
columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featureflow.errors import UserError
from sae import Sae

SAME_DIRECTION = 1 - 1e-6
"""Two unit rows with a cosine above this are one direction."""
CONTAMINATED = 0.1
"""Share of squared norm along the mean direction above which a dictionary is reported as leaning on
it. A dictionary without a common direction has about 1 / latents."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Unit rows of one dictionary, and what its latents read. Rows that are not `usable` are
    zero."""

    unit: Float[Tensor, "latent d_model"]
    reads: Float[Tensor, "latent d_model"]
    usable: Bool[Tensor, "latent"]
    n_duplicates: int
    mean_share: float
    warnings: tuple[str, ...]

    @property
    def n_latents(self) -> int:
        return self.unit.shape[0]

    @property
    def d_model(self) -> int:
        return self.unit.shape[1]

    def restricted(self, keep: Bool[Tensor, "latent"]) -> Directions:
        """The same dictionary with only `keep` rows usable (dead latents take no part in links)."""
        usable = self.usable & keep.to(self.usable.device)
        return Directions(
            unit=self.unit * usable[:, None],
            reads=self.reads * usable[:, None],
            usable=usable,
            n_duplicates=self.n_duplicates,
            mean_share=self.mean_share,
            warnings=self.warnings,
        )


def sae_directions(
    sae: Sae,
    *,
    name: str,
    projection: Float[Tensor, "d_out d_model"] | None = None,
    device: str | torch.device = "cpu",
) -> Directions:
    """Directions of an SAE and what its latents read; a transcoder's encoder reads another space.
    Raises UserError."""
    elsewhere = "reads" in sae.metadata or sae.metadata.get("transcodes")
    encoder = None if elsewhere else sae.W_enc
    return directions_of(
        sae.W_dec, name=name, encoder=encoder, projection=projection, device=device
    )


def directions_of(
    rows: Float[Tensor, "latent d_out"],
    *,
    name: str,
    encoder: Float[Tensor, "latent d_in"] | None = None,
    projection: Float[Tensor, "d_out d_model"] | None = None,
    device: str | torch.device = "cpu",
) -> Directions:
    """Unit directions of decoder `rows`; `encoder` rows only where they read the space that the
    decoder writes. `name` is used in messages. Raises UserError for a matrix that is not one."""
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(
            "not a dictionary",
            where=name,
            expected="rows [latent, d_out]",
            found=str(tuple(rows.shape)),
        )
    matrix = rows.detach().to(device=device, dtype=torch.float32)
    if projection is not None:
        if projection.shape[0] != matrix.shape[1]:
            raise UserError(
                "the projection does not fit the decoder",
                where=name,
                expected=f"[{matrix.shape[1]}, d_model]",
                found=str(tuple(projection.shape)),
            )
        matrix = matrix @ projection.to(matrix)
    norms = torch.linalg.vector_norm(matrix, dim=1)
    usable = torch.isfinite(norms) & (norms > torch.finfo(torch.float32).tiny)
    unit = torch.where(
        usable[:, None],
        matrix / norms.clamp_min(1e-30)[:, None],
        torch.zeros((), device=matrix.device),
    )
    duplicates = _count_duplicates(unit, usable)
    share = _mean_share(unit, usable)
    return Directions(
        unit=unit,
        reads=_reads(unit if encoder is None or projection is not None else encoder, unit, usable),
        usable=usable,
        n_duplicates=duplicates,
        mean_share=share,
        warnings=_warnings(name, usable, duplicates, share),
    )


def _reads(
    encoder: Float[Tensor, "latent d_in"],
    unit: Float[Tensor, "latent d_model"],
    usable: Bool[Tensor, "latent"],
) -> Float[Tensor, "latent d_model"]:
    """Whitened encoder rows that read 1 of their own direction; the direction itself for a latent
    that does not read its own."""
    rows = (unit if encoder.shape != unit.shape else encoder).detach().to(unit)
    moment = unit.T @ unit / max(int(usable.sum()), 1)
    moment.diagonal().add_(moment.diagonal().mean().clamp_min(1e-12))
    white = torch.linalg.solve(moment, rows.T).T
    own = torch.einsum("ld,ld->l", white, unit)[:, None]
    reads = white / own.clamp_min(1e-30)
    return torch.where((own > 0) & torch.isfinite(reads).all(1, keepdim=True), reads, unit)


def _count_duplicates(unit: Float[Tensor, "latent d_model"], usable: Bool[Tensor, "latent"]) -> int:
    """Rows equal to their neighbour when all rows are sorted along one fixed random line: equal
    rows fall together."""
    rows = unit[usable]
    if rows.shape[0] < 2:
        return 0
    line = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    order: Int64[Tensor, "latent"] = torch.argsort(rows @ line)
    ordered = rows[order]
    return int((torch.einsum("ld,ld->l", ordered[1:], ordered[:-1]) > SAME_DIRECTION).sum())


def _mean_share(unit: Float[Tensor, "latent d_model"], usable: Bool[Tensor, "latent"]) -> float:
    n = int(usable.sum())
    return float((unit.sum(0) / n).square().sum()) if n else 0.0


def _warnings(
    name: str, usable: Bool[Tensor, "latent"], duplicates: int, share: float
) -> tuple[str, ...]:
    found = []
    if missing := int((~usable).sum()):
        found.append(
            f"{name}: {missing} of {len(usable)} decoder rows have no direction (zero or not "
            "finite); left out"
        )
    if duplicates:
        found.append(
            f"{name}: {duplicates} decoder rows repeat another row; which of them is linked is "
            "arbitrary"
        )
    if share > CONTAMINATED and int(usable.sum()) > 1:
        found.append(
            f"{name}: {share:.0%} of every row lies along one common direction; cosines are "
            "inflated"
        )
    return tuple(found)
