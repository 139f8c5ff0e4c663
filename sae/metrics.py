"""How well dictionaries reconstruct: activations, codes and reconstructions in, one row of numbers
out.

1. `ReconstructionMeter.update` adds one batch to float64 sums: errors, norms, activations, and the
   same sums by document.
2. `ReconstructionMeter.result` turns the sums into `Reconstruction`; every formula is in
   docs/metrics.md.
3. `ReconstructionMeter.fvu_interval` resamples whole documents, because tokens of one document are
   not independent.
4. `CovarianceMeter` and `pca_fvu` give the baseline: what a PCA of k components leaves unexplained
   on the same rows.

Cost: one pass, O(batch · d + document · d + latent) memory; `pca_fvu` is one d×d
eigendecomposition. Nothing here depends on how the rows are cut into batches, except the value kept
under SAEBench's name, whose definition does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.errors import UserError
from featureflow.statistics import Interval, bootstrap

DENSE_RATE = 0.1
"""A latent that is active on more than this share of tokens is dense."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What `ReconstructionMeter` measured; formulas and units in docs/metrics.md."""

    n_tokens: int
    n_documents: int
    n_latents: int
    fvu: float
    l0: float
    mean_squared_error: float
    dead_fraction: float
    dense_fraction: float
    cosine: float
    l2_ratio: float
    saebench_explained_variance: float
    saebench_explained_variance_legacy: float


@dataclass(kw_only=True)
class ReconstructionMeter:
    """Streaming sums over batches of one dictionary. `centre` is any fixed vector near the mean of
    the activations: it changes no result, it keeps the subtraction of the mean exact when the mean
    is large."""

    n_latents: int
    d_out: int
    centre: Float[Tensor, "d_out"] | None = None
    n_tokens: int = 0
    counts: Int[Tensor, "latent"] = field(init=False)
    _centre: Float[Tensor, "d_out"] = field(init=False)
    _sums: dict[str, float] = field(init=False)
    _documents: dict[int, _DocumentSums] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.n_latents, dtype=torch.int64)
        self._sums = dict.fromkeys(("cosine", "l2_ratio", "squared_norm", "legacy"), 0.0)
        zeros = torch.zeros(self.d_out, dtype=torch.float64)
        self._centre = zeros if self.centre is None else self.centre.double().cpu()

    def update(
        self,
        target: Float[Tensor, "token d_out"],
        reconstruction: Float[Tensor, "token d_out"],
        active: Int[Tensor, "activation"],
        documents: Int[Tensor, "token"] | None = None,
    ) -> None:
        """Add one batch. `active` lists the latent of every non-zero code of the batch, in any
        order (`active_latents` makes it). Without `documents` the batch counts as one document."""
        if not torch.isfinite(reconstruction).all() or not torch.isfinite(target).all():
            raise UserError(
                "activations or reconstructions are not finite",
                where=f"evaluated rows after {self.n_tokens}",
            )
        x, y = target.double().cpu(), reconstruction.double().cpu()
        error = (x - y).square().sum(-1)
        norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
        self._sums["cosine"] += _safe_ratio((x * y).sum(-1), norm_x * norm_y).sum().item()
        self._sums["l2_ratio"] += _safe_ratio(norm_y, norm_x).sum().item()
        self._sums["squared_norm"] += norm_x.square().sum().item()
        self._sums["legacy"] += (
            (1 - _safe_ratio(error, (x - x.mean(0)).square().sum(-1))).sum().item()
        )
        self.counts += torch.bincount(active.cpu(), minlength=self.n_latents)
        self.n_tokens += len(x)
        self._add_documents(x - self._centre, error, documents)

    def result(self) -> Reconstruction:
        """The numbers so far. Raises UserError when no row has been added or all rows are equal."""
        if self.n_tokens == 0:
            raise UserError("no tokens to measure on", expected="at least one held-out row")
        n, sums = self.n_tokens, self._sums
        error, total = self._document_table().error.sum(), self._total_variance()
        mean_error, mean_norm = error / n, sums["squared_norm"] / n
        rate = self.counts.double() / n
        return Reconstruction(
            n_tokens=n,
            n_documents=len(self._documents),
            n_latents=self.n_latents,
            fvu=float(error / total) if total > 0 else float("nan"),
            l0=self.counts.sum().item() / n,
            mean_squared_error=float(mean_error),
            dead_fraction=(self.counts == 0).double().mean().item(),
            dense_fraction=(rate > DENSE_RATE).double().mean().item(),
            cosine=sums["cosine"] / n,
            l2_ratio=sums["l2_ratio"] / n,
            saebench_explained_variance=float(
                1 - mean_error / (mean_norm - (mean_norm / self.d_out) ** 2)
            ),
            saebench_explained_variance_legacy=sums["legacy"] / n,
        )

    def fvu_interval(self, *, n_resamples: int, seed: int) -> Interval:
        """95 % interval of FVU over documents; the global mean is taken anew from the documents of
        every resample."""
        table = self._document_table()

        def fvu(weights: Float[np.ndarray, "draw document"]) -> Float[np.ndarray, "draw"]:
            n, error, squares = weights @ table.n, weights @ table.error, weights @ table.squares
            total = squares - np.square(weights @ table.vectors).sum(1) / n
            return error / np.where(total > 0, total, np.nan)

        return bootstrap(fvu, len(table.n), seed=seed, n=n_resamples)

    def _add_documents(
        self,
        centred: Float[Tensor, "token d_out"],
        error: Float[Tensor, "token"],
        documents: Int[Tensor, "token"] | None,
    ) -> None:
        if documents is None:
            documents = torch.full((len(error),), -1 - len(self._documents), dtype=torch.int64)
        names, where = torch.unique(documents.cpu(), return_inverse=True)
        squares = centred.square().sum(-1)
        for i, name in enumerate(names.tolist()):
            mine = where == i
            entry = self._documents.setdefault(
                name, _DocumentSums(vector=torch.zeros(self.d_out, dtype=torch.float64))
            )
            entry.n += int(mine.sum())
            entry.error += error[mine].sum().item()
            entry.squares += squares[mine].sum().item()
            entry.vector += centred[mine].sum(0)

    def _total_variance(self) -> float:
        table = self._document_table()
        return float(table.squares.sum() - np.square(table.vectors.sum(0)).sum() / table.n.sum())

    def _document_table(self) -> _DocumentTable:
        entries = list(self._documents.values())
        return _DocumentTable(
            n=np.array([entry.n for entry in entries], dtype=np.float64),
            error=np.array([entry.error for entry in entries]),
            squares=np.array([entry.squares for entry in entries]),
            vectors=np.stack([entry.vector.numpy() for entry in entries])
            if entries
            else np.zeros((0, self.d_out)),
        )


def active_latents(
    index: Int[Tensor, "token k"], value: Float[Tensor, "token k"]
) -> Int[Tensor, "activation"]:
    """The latents of the slots that hold a non-zero value (empty slots of sparse codes hold 0)."""
    return index[value != 0]


@dataclass(kw_only=True)
class CovarianceMeter:
    """Streaming mean and covariance in float64 of rows shifted by `centre`."""

    centre: Float[Tensor, "d_out"]
    n: int = 0
    total: Float[Tensor, "d_out"] = field(init=False)
    product: Float[Tensor, "d_out d_out"] = field(init=False)

    def __post_init__(self) -> None:
        self.centre = self.centre.double().cpu()
        self.total = torch.zeros_like(self.centre)
        self.product = torch.zeros(len(self.centre), len(self.centre), dtype=torch.float64)

    def update(self, rows: Float[Tensor, "token d_out"]) -> None:
        shifted = rows.double().cpu() - self.centre
        self.n += len(shifted)
        self.total += shifted.sum(0)
        self.product.addmm_(shifted.T, shifted)

    @property
    def mean(self) -> Float[Tensor, "d_out"]:
        return self.centre + self.total / self.n

    def scatter_about(self, point: Float[Tensor, "d_out"]) -> Float[Tensor, "d_out d_out"]:
        """Σ (x − point)(x − point)ᵀ over the rows seen."""
        offset = self.centre - point
        cross = torch.outer(self.total, offset)
        return self.product + cross + cross.T + self.n * torch.outer(offset, offset)


def pca_fvu(train: CovarianceMeter, held_out: CovarianceMeter) -> Float[np.ndarray, "n_components"]:
    """FVU on the held-out rows of the PCA fitted on the train rows, for 0, 1, …, d components.

    The PCA subtracts the train mean and keeps the leading eigenvectors of the train covariance; the
    denominator is the held-out variance about the held-out mean, as for a dictionary. So entry 0 is
    slightly above 1.
    """
    if train.n < 2 or held_out.n < 2:
        raise UserError(
            "too few rows for a PCA",
            expected="at least 2 train and 2 held-out rows",
            found=f"{train.n}, {held_out.n}",
        )
    _, vectors = torch.linalg.eigh(train.scatter_about(train.mean) / train.n)
    scatter = held_out.scatter_about(train.mean)
    explained = ((scatter @ vectors) * vectors).sum(0).flip(0)
    total = torch.trace(held_out.scatter_about(held_out.mean))
    left = torch.trace(scatter) - torch.cat(
        [torch.zeros(1, dtype=torch.float64), explained.cumsum(0)]
    )
    return (left.clamp_min(0) / total).numpy()


@torch.no_grad()
def rows_fvu(
    train: Float[Tensor, "row d_out"], held_out: Float[Tensor, "token d_out"], k: int
) -> float:
    """FVU of a dictionary without training: the train rows as they are, less their mean. Each token
    takes the `k` rows with the largest cosines and their least squares. Harder to beat than PCA."""
    mean = train.float().mean(0)
    unit = torch.nn.functional.normalize(train.float() - mean, dim=1)
    error = 0.0
    for block in held_out.float().split(256):
        x = block - mean
        chosen = unit[(x @ unit.T).abs().topk(min(k, len(unit)), dim=1).indices]
        gram = chosen @ chosen.mT
        gram.diagonal(dim1=1, dim2=2).add_(1e-4)  # rows of one text are nearly the same
        weight = torch.linalg.solve(gram, chosen @ x[:, :, None])
        error += float((x - (weight.mT @ chosen)[:, 0]).double().square().sum())
    total = (held_out.double() - held_out.double().mean(0)).square().sum()
    return error / float(total)


def n_components_to_match(curve: Float[np.ndarray, "n_components"], fvu: float) -> int:
    """The least number of PCA components that leaves no more unexplained than `fvu`."""
    return int(np.argmax(curve <= fvu)) if (curve <= fvu).any() else len(curve) - 1


@dataclass(kw_only=True)
class _DocumentSums:
    vector: Float[Tensor, "d_out"]
    n: int = 0
    error: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _DocumentTable:
    n: Float[np.ndarray, "document"]
    error: Float[np.ndarray, "document"]
    squares: Float[np.ndarray, "document"]
    vectors: Float[np.ndarray, "document d_out"]


def _safe_ratio(
    above: Float[Tensor, "token"], below: Float[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """above / below, and 0 where below is 0: a zero vector has no direction."""
    return torch.where(
        below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), torch.zeros_like(above)
    )
