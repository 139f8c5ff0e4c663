"""Dictionaries with the model in the loop: how much of the model's loss survives when an activation
is replaced by its reconstruction.

1. Run the model on held-out contexts and keep the activations at every site wanted.
2. For each site and each replacement (reconstruction, zero, mean), put the replacement at the
   ordinary positions, leave BOS, special and sink positions as they are, and run the model from
   that site on: the blocks before it are skipped, because what they would compute is known
   (`data/model/partial_forward.py`).
3. Sum cross-entropy of the next token and KL(original ‖ replaced) by document; report what share of
   the ablation's damage the reconstruction avoids, with bootstrap intervals over documents.

    CE recovered = (CE_ablated − CE_replaced) / (CE_ablated − CE_original)
    KL recovered = 1 − KL_replaced / KL_ablated

Cost: one forward pass per batch, and for each site 2 + (number of its dictionaries) passes over the
blocks after it. Memory: batches are cut so that logits take no more than `_LOGIT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from featureflow.statistics import Interval, bootstrap_ratio
from pipeline.lenses.evaluation.held_out import Contexts
from sae.dictionary import Sae

_LOGIT_BYTES = 256 << 20
ORIGINAL, ZERO, MEAN = "original", "zero", "mean"


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A dictionary to splice in at `site`. A transcoder reads another site, `reads`. `mean` is the
    site's mean."""

    name: str
    site: Site
    sae: Sae
    mean: Float[Tensor, "d_out"]
    reads: Site | None = None


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Losses in nats per token over the counted positions. A share is NaN where the ablation does
    no damage."""

    n_tokens: int
    n_documents: int
    ce_original: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_zero: float
    kl_mean: float
    ce_recovered_zero: float
    ce_recovered_zero_interval: Interval
    ce_recovered_mean: float
    ce_recovered_mean_interval: Interval
    kl_recovered_zero: float
    kl_recovered_mean: float


@torch.no_grad()
def measure_recovery(
    model: LanguageModel,
    subjects: Sequence[Subject],
    contexts: Contexts,
    *,
    n_resamples: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, Recovery]:
    """One `Recovery` per subject, by name."""
    sums = _Sums(contexts)
    sites = tuple(dict.fromkeys(subject.site for subject in subjects))
    batches = list(_batches(contexts, model))
    for done, batch in enumerate(batches):
        progress("evaluate with the model", done, len(batches))
        run = _Original(model, sites, subjects, batch)
        sums.add(batch, ORIGINAL, run.losses(run.logits))
        for site in sites:
            here = [subject for subject in subjects if subject.site == site]
            sums.add(batch, f"{site}:{ZERO}", run.replaced(site, torch.zeros_like(here[0].mean)))
            sums.add(batch, f"{site}:{MEAN}", run.replaced(site, here[0].mean))
            for subject in here:
                reconstruction = subject.sae(run.seen[subject.reads or site])
                sums.add(batch, f"{site}:{subject.name}", run.replaced(site, reconstruction))
    progress("evaluate with the model", len(batches), len(batches))
    return {s.name: sums.recovery(s, n_resamples=n_resamples, seed=seed) for s in subjects}


def logits_with(
    model: LanguageModel,
    ids: Int[Tensor, "batch position"],
    site: Site,
    value: Float[Tensor, "batch position d_model"],
    resid_pre: Float[Tensor, "batch position d_model"],
) -> Float[Tensor, "batch position vocab"]:
    """Logits when the activation at `site` is `value`. `resid_pre` is what the stream held before
    the site's block; blocks that come before are not run."""
    is_stream = site.kind in ("resid_pre", "resid_post")
    last_skipped = site.layer if site.kind == "resid_post" else site.layer - 1
    with ExitStack() as stack:
        if last_skipped >= 0:
            stack.enter_context(
                continued_from(model, last_skipped, value if is_stream else resid_pre)
            )
        if last_skipped < 0 or not is_stream:
            stack.enter_context(model.edited({site: lambda _: value.to(model.device, model.dtype)}))
        return model.logits(ids)


@dataclass(kw_only=True)
class _Batch:
    """Some of the contexts."""

    ids: Int[Tensor, "batch position"]
    spliced: Bool[Tensor, "batch position"]
    counted: Bool[Tensor, "batch position"]
    documents: Int[Tensor, "counted"]
    targets: Int[Tensor, "counted"]


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """Per counted position, in nats."""

    ce: Float[np.ndarray, "counted"]
    kl: Float[np.ndarray, "counted"]


class _Original:
    """The untouched run of one batch, and what replacing an activation does to it."""

    def __init__(
        self,
        model: LanguageModel,
        sites: Sequence[Site],
        subjects: Sequence[Subject],
        batch: _Batch,
    ) -> None:
        self.model, self.batch = model, batch
        before = [Site(site.layer, "resid_pre") for site in sites]
        reads = [subject.reads for subject in subjects if subject.reads is not None]
        with model.recorded(tuple(dict.fromkeys([*sites, *before, *reads]))) as seen:
            self.logits = model.logits(batch.ids)
        self.seen = dict(seen)
        self.original_logits = self._counted(self.logits)
        self.log_sum = self.original_logits.logsumexp(-1)
        self.p = (self.original_logits - self.log_sum[:, None]).exp_()

    def replaced(self, site: Site, value: Tensor) -> _Losses:
        """Losses when `value` stands at the spliced positions of `site`."""
        original = self.seen[site]
        where = rearrange(self.batch.spliced, "batch position -> batch position 1").to(
            original.device
        )
        spliced = torch.where(where, value.to(original.device, original.dtype), original)
        before = self.seen[Site(site.layer, "resid_pre")]
        return self.losses(logits_with(self.model, self.batch.ids, site, spliced, before))

    def losses(self, logits: Float[Tensor, "batch position vocab"]) -> _Losses:
        """CE and KL without the log-probabilities of all tokens: both follow from the logits and
        their log-sum."""
        q = self._counted(logits)
        log_sum = q.logsumexp(-1)
        ce = log_sum - q.gather(1, self.batch.targets[:, None].to(q.device))[:, 0]
        kl = torch.linalg.vecdot(self.p, self.original_logits - q) + log_sum - self.log_sum
        return _Losses(ce=ce.double().cpu().numpy(), kl=kl.clamp_min(0).double().cpu().numpy())

    def _counted(
        self, logits: Float[Tensor, "batch position vocab"]
    ) -> Float[Tensor, "counted vocab"]:
        return logits[self.batch.counted.to(logits.device)].float()


@dataclass
class _Sums:
    """Losses summed by document, in float64."""

    contexts: Contexts
    names: Int[Tensor, "document"] = field(init=False)
    ce: dict[str, Float[np.ndarray, "document"]] = field(init=False, default_factory=dict)
    kl: dict[str, Float[np.ndarray, "document"]] = field(init=False, default_factory=dict)
    n: Float[np.ndarray, "document"] = field(init=False)

    def __post_init__(self) -> None:
        counted = self.contexts.documents[self.contexts.counted]
        self.names, counts = torch.unique(counted, return_counts=True)
        self.n = counts.double().numpy()

    def add(self, batch: _Batch, run: str, losses: _Losses) -> None:
        where = torch.searchsorted(self.names, batch.documents).numpy()
        for sums, values in ((self.ce, losses.ce), (self.kl, losses.kl)):
            np.add.at(sums.setdefault(run, np.zeros(len(self.names))), where, values)

    def recovery(self, subject: Subject, *, n_resamples: int, seed: int) -> Recovery:
        spliced, zero, mean = (f"{subject.site}:{name}" for name in (subject.name, ZERO, MEAN))
        n = self.n.sum()
        against_zero, against_mean = (
            self._share(spliced, ablated, n_resamples, seed) for ablated in (zero, mean)
        )
        return Recovery(
            n_tokens=int(n),
            n_documents=len(self.names),
            ce_original=float(self.ce[ORIGINAL].sum() / n),
            ce_spliced=float(self.ce[spliced].sum() / n),
            ce_zero=float(self.ce[zero].sum() / n),
            ce_mean=float(self.ce[mean].sum() / n),
            kl_spliced=float(self.kl[spliced].sum() / n),
            kl_zero=float(self.kl[zero].sum() / n),
            kl_mean=float(self.kl[mean].sum() / n),
            ce_recovered_zero=against_zero[0],
            ce_recovered_zero_interval=against_zero[1],
            ce_recovered_mean=against_mean[0],
            ce_recovered_mean_interval=against_mean[1],
            kl_recovered_zero=_kl_share(self.kl[spliced], self.kl[zero]),
            kl_recovered_mean=_kl_share(self.kl[spliced], self.kl[mean]),
        )

    def _share(
        self, spliced: str, ablated: str, n_resamples: int, seed: int
    ) -> tuple[float, Interval]:
        kept, damage = self.ce[ablated] - self.ce[spliced], self.ce[ablated] - self.ce[ORIGINAL]
        if damage.sum() <= 0:
            nan = float("nan")
            return nan, Interval(mean=nan, low=nan, high=nan, n=len(kept))
        found = bootstrap_ratio(kept, damage, seed=seed, n=n_resamples)
        return found.mean, found


def _kl_share(
    spliced: Float[np.ndarray, "document"], ablated: Float[np.ndarray, "document"]
) -> float:
    return float(1 - spliced.sum() / ablated.sum()) if ablated.sum() > 0 else float("nan")


def _batches(contexts: Contexts, model: LanguageModel) -> Iterator[_Batch]:
    n_contexts, width = contexts.ids.shape
    size = max(1, _LOGIT_BYTES // (4 * width * model.d_vocab))
    for start in range(0, n_contexts, size):
        rows = slice(start, start + size)
        counted = contexts.counted[rows]
        following = contexts.ids[rows].roll(-1, dims=1)
        yield _Batch(
            ids=contexts.ids[rows],
            spliced=contexts.spliced[rows],
            counted=counted,
            documents=contexts.documents[rows][counted],
            targets=following[counted],
        )
