"""A pair of dictionaries → what best cosine mere chance gives, under a chosen idea of chance.

Each sample is the largest cosine of a direction that shares no feature with the source dictionary.
Where such directions come from is the choice:

- `Siblings`: each target's own part replaced, what it shares with its siblings kept (siblings.py).
  The null for dictionaries of different starts: it alone keeps clusters.
- `Rotation`: target rows turned at random inside the source's own eigenbasis, in blocks of
  neighbouring eigenvalues, the mean direction left alone. Width, dimension, anisotropy and the
  common mean are kept; what a feature is, is not.
- `Isotropic`: random directions. Right only for dictionaries without anisotropy; the weakest null.
- `Shuffled`: every coordinate shuffled among the target's rows; keeps what single coordinates
  (outlier dimensions) do.
- `FarLayers`: the target against a dictionary many layers away, of the same start where the pair
  has one. A minority of features is really carried that far, so only the lower half of the sample
  is believed and mirrored at its median (Efron's empirical null); right while less than half of the
  links between far layers are real.
- a dictionary that left the *same start* for data with nothing in common (`start_null.py`): what
  inertia leaves.

Cost: `n` rows against the source, so n / n_target of one match; plus one eigendecomposition of
d_model × d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from featureflow.statistics import p_values
from pipeline.flow.directions import Directions
from pipeline.flow.match import best_cosines, full_precision
from pipeline.flow.siblings import sibling_sample

_ROWS_PER_ROTATION = 512


class Siblings(Settings):
    """What each target shares with its siblings kept, its own part random."""

    n_decoys: Annotated[int, Ge(3), Doc("decoys of each target, at least")] = 8
    n_sources: Annotated[
        int, Ge(0), Doc("sources, beyond a target's two nearest, that count as its siblings")
    ] = 16
    kind: Literal["siblings"] = "siblings"


class Rotation(Settings):
    """Rotate inside the eigenbasis, spectrum and mean kept."""

    block: Annotated[
        int, Ge(2), Doc("neighbouring eigenvectors that are mixed with each other")
    ] = 16
    kind: Literal["rotation"] = "rotation"


class Isotropic(Settings):
    """Random directions."""

    kind: Literal["isotropic"] = "isotropic"


class Shuffled(Settings):
    """Each coordinate shuffled among the rows."""

    kind: Literal["shuffled"] = "shuffled"


class FarLayers(Settings):
    """Dictionaries many layers apart."""

    min_distance: Annotated[int | None, Doc("layers between the two; none: half the depth")] = None
    kind: Literal["far"] = "far"


DirectionNull = Siblings | Rotation | Isotropic | Shuffled


@dataclass(frozen=True, kw_only=True)
class NullSample:
    """Best cosines under one null, unsorted. `of_start`: what a common start alone leaves. Where
    each target has a null of its own, `centre` and `scale` are its units and `in_units` is the
    pooled sample in them."""

    name: str
    best_cosine: Float[np.ndarray, "sample"]
    of_start: bool = False
    centre: Float[np.ndarray, "target"] | None = None
    scale: Float[np.ndarray, "target"] | None = None
    in_units: Float[np.ndarray, "sample"] | None = None

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.best_cosine, share))

    def p_values(
        self, cosine: Float[np.ndarray, "edge"], target: Int64[np.ndarray, "edge"]
    ) -> Float[np.ndarray, "edge"]:
        """How often chance gives a target such a cosine."""
        if self.in_units is None or self.centre is None or self.scale is None:
            return p_values(cosine, self.best_cosine)
        return p_values((cosine - self.centre[target]) / self.scale[target], self.in_units)

    def cosine_at(self, p: float) -> float:
        """The cosine with p-value `p`; of the median target where each has a null of its own."""
        if self.in_units is None or self.centre is None or self.scale is None:
            return self.quantile(1 - p)
        units = float(np.quantile(self.in_units, 1 - p))
        return float(np.nanmedian(self.centre + self.scale * units))


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The mean direction of a dictionary and the eigenbasis of what is left, strongest first."""

    mean: Float[Tensor, "d_model"]
    basis: Float[Tensor, "d_model eigenvector"]


@dataclass(frozen=True, kw_only=True)
class NullSampler:
    """Draws `n` best cosines for a pair under one idea of chance."""

    choice: DirectionNull
    n: int
    tile: int = 2048

    def sample(
        self, source: Directions, target: Directions, generator: torch.Generator
    ) -> NullSample:
        """`n` best cosines with `source` of directions made from rows of `target`."""
        if isinstance(self.choice, Siblings):
            n_decoys = max(self.choice.n_decoys, -(-self.n // max(int(target.usable.sum()), 1)))
            in_units, centre, scale, decoys = sibling_sample(
                source,
                target,
                n_decoys=n_decoys,
                n_sources=self.choice.n_sources,
                generator=generator,
                tile=self.tile,
            )
            return NullSample(
                name=self.choice.kind,
                best_cosine=decoys.ravel(),
                centre=centre,
                scale=scale,
                in_units=in_units,
            )
        rows = target.unit[target.usable]
        drawn = rows[torch.randint(rows.shape[0], (self.n,), generator=generator).to(rows.device)]
        with full_precision(), torch.no_grad():
            made = self._made(drawn, rows, source, generator)
            best = best_cosines(made, source, tile=self.tile)
        return NullSample(name=self.choice.kind, best_cosine=best.cpu().numpy())

    def _made(
        self, drawn: Tensor, rows: Tensor, source: Directions, generator: torch.Generator
    ) -> Tensor:
        match self.choice:
            case Rotation(block=block):
                spectrum = spectrum_of(source)
                parts = drawn.split(_ROWS_PER_ROTATION)
                return torch.cat(
                    [rotated_within(part, spectrum, block, generator) for part in parts]
                )
            case Isotropic():
                noise = torch.randn(drawn.shape, generator=generator).to(drawn)
                return noise / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
            case Shuffled():
                keys = torch.rand(drawn.shape, generator=generator).to(drawn)
                mixed = drawn.gather(0, keys.argsort(0))
                return mixed / torch.linalg.vector_norm(mixed, dim=1, keepdim=True).clamp_min(1e-12)
            case _:
                raise AssertionError(self.choice)


def spectrum_of(directions: Directions) -> Spectrum:
    """Mean direction, and eigenvectors of the second moment of the rows without it."""
    rows = directions.unit[directions.usable]
    mean = rows.mean(0)
    norm = torch.linalg.vector_norm(mean)
    mean = mean / norm.clamp_min(1e-12)
    rest = rows - torch.outer(rows @ mean, mean)
    moment = rest.T @ rest / max(rows.shape[0], 1)
    marked = moment + 2 * torch.outer(mean, mean)  # no row is longer than 1, so the mean comes last
    # NumPy's eigh is several times faster than torch's on CPUs
    basis = torch.from_numpy(np.linalg.eigh(marked.cpu().numpy())[1]).to(rows)
    return Spectrum(mean=mean, basis=basis[:, :-1].flip(1))


def rotated_within(
    rows: Float[Tensor, "row d_model"], spectrum: Spectrum, block: int, generator: torch.Generator
) -> Float[Tensor, "row d_model"]:
    """`rows` under one random rotation that mixes only neighbouring eigenvectors and keeps the mean
    direction."""
    along = rows @ spectrum.mean
    rest = rows - along[:, None] * spectrum.mean
    inside = rest @ spectrum.basis
    whole = inside.shape[1] - inside.shape[1] % block
    turned = [
        _turned(
            rearrange(inside[:, :whole], "row (block within) -> block row within", within=block),
            generator,
        )
    ]
    if inside.shape[1] > whole:
        turned.append(_turned(inside[None, :, whole:], generator))
    flat = torch.cat(
        [rearrange(t, "block row within -> row (block within)") for t in turned], dim=1
    )
    return flat @ spectrum.basis.T + along[:, None] * spectrum.mean


def mirrored(best_cosine: Float[np.ndarray, "sample"]) -> Float[np.ndarray, "mirrored"]:
    """The lower half of a sample and its mirror image at the median: a null when less than half of
    it is real."""
    median = np.median(best_cosine)
    lower = best_cosine[best_cosine <= median]
    return np.concatenate([lower, 2 * median - lower])


def _turned(
    inside: Float[Tensor, "block row within"], generator: torch.Generator
) -> Float[Tensor, "block row within"]:
    """Each block under an orthogonal matrix of its own, uniform over all of them (QR of a Gaussian,
    signs fixed)."""
    n_blocks, _, within = inside.shape
    gaussian = torch.randn(n_blocks, within, within, generator=generator)
    orthogonal, upper = torch.linalg.qr(gaussian)
    orthogonal = orthogonal * torch.sign(torch.diagonal(upper, dim1=1, dim2=2))[:, None, :]
    return inside @ orthogonal.to(inside)
