"""Jobs of a plan → batch jobs: all dictionaries that are trained on the same batches, so that each
batch is read once.

1. The dictionary of the plan itself, and beside it one for every variant of a sweep (another k,
   width, architecture or rate at the same site). All of them see the same rows in the same order;
   each is what it would be if trained alone.
2. Transcoders are batch jobs of their own: they read one site of a block and predict what its MLP
   adds to the stream.

An SAE's `folder` says where its dictionary goes below the artifact: `dictionaries/` for those
that the later stages use, `variants/<name>/` for the others of a sweep, `transcoders/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from annotated_types import Gt, MinLen
from pydantic import model_validator
from typing_extensions import Doc

from data.store import ActivationStore
from data.store.patterns import parse_sites
from featureflow.errors import Problem, UserError
from featureflow.settings import Settings
from featureflow.sites import Site
from pipeline.training.plan import SiteJob, rate_at
from sae.architectures import AnyArchitecture, TopK

DICTIONARIES, VARIANTS, TRANSCODERS = "dictionaries", "variants", "transcoders"
BASE = "base"


class Variant(Settings):
    """One more dictionary at a site, trained on the same batches. What is none stays as it is in
    the recipe."""

    name: Annotated[str, MinLen(1), Doc("its name: letters, digits, '-', '_', '.'")]
    sites: Annotated[
        tuple[str, ...],
        Doc(
            "sites or patterns; empty for all. A variant at some sites only starts from random "
            "directions there"
        ),
    ] = ()
    architecture: Annotated[AnyArchitecture | None, Doc("architecture of this variant")] = None
    n_latents: Annotated[int | None, Gt(0), Doc("latents of this variant")] = None
    learning_rate: Annotated[float | None, Gt(0), Doc("peak learning rate of this variant")] = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        plain = bool(self.name) and all(
            character.isalnum() or character in "-_." for character in self.name
        )
        if not plain or self.name.startswith(".") or self.name == BASE:
            raise ValueError(f"a variant cannot be called {self.name!r}")
        return self


class Transcoders(Settings):
    """Dictionaries that predict an MLP's output from its input. They go to `transcoders/` and are
    evaluated."""

    sites: Annotated[tuple[str, ...], Doc("MLP output sites or patterns")] = ("mlp_out",)
    reads: Annotated[
        Literal["resid_mid", "resid_pre"],
        Doc("the site of the same block that is read; resid_mid is what the MLP's norm sees"),
    ] = "resid_mid"
    skip: Annotated[bool, Doc("add a linear map from input to output (a skip transcoder)")] = True
    architecture: Annotated[AnyArchitecture, Doc("how latents are chosen and kept few")] = TopK()
    n_latents: Annotated[int, Gt(0), Doc("latents of each transcoder")] = 2048
    steps: Annotated[int, Gt(0), Doc("optimizer steps of each transcoder")] = 1600
    learning_rate: Annotated[
        float | None, Gt(0), Doc("peak learning rate; none for the law of train.learning_rate")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SaeJob:
    """One dictionary of a batch job. `reads` is the input site of a transcoder, `skip` whether it
    has a linear part."""

    job: SiteJob
    folder: str = DICTIONARIES
    reads: Site | None = None
    skip: bool = False

    @property
    def label(self) -> str:
        """How messages call it."""
        if self.folder.startswith(VARIANTS):
            return f"{self.job.site.short} {self.folder.removeprefix(f'{VARIANTS}/')}"
        return f"{self.job.site.short} transcoder" if self.reads else self.job.site.short

    @property
    def sites(self) -> tuple[Site, ...]:
        """What a batch holds: the input, and the output where it is another site."""
        return (self.job.site,) if self.reads is None else (self.reads, self.job.site)


BatchJob = tuple[SaeJob, ...]
"""SAEs with the same batches: equal `sites`, and seeds of the jobs that are equal too."""


def batch_jobs_of(
    jobs: Sequence[SiteJob],
    sweep: Sequence[Variant],
    store: ActivationStore,
    *,
    used: str,
    steps: int,
    learning_rate: float | None,
) -> dict[Site, BatchJob]:
    """Every site's SAEs, the plan's own first. `used` names the one that later stages see;
    `steps` are those of a random start, `learning_rate` the recipe's. Raises UserError with every
    impossible choice."""
    names = [BASE, *(variant.name for variant in sweep)]
    problems = [
        Problem(what="two variants of one name", where=f"train.sweep[{index - 1}]", found=name)
        for index, name in enumerate(names)
        if name in names[:index]
    ]
    if used not in names:
        problems.append(
            Problem(
                what="no such variant", where="train.used", expected=", ".join(names), found=used
            )
        )
    at = {v.name: parse_sites(v.sites, store.sites) if v.sites else None for v in sweep}
    batch_jobs: dict[Site, BatchJob] = {}
    for job in jobs:
        here = [(BASE, job)]
        for variant in sweep:
            wanted = at[variant.name]
            if wanted is None or job.site in wanted:
                here.append((variant.name, _varied(job, variant, steps, learning_rate)))
        problems += [p for name, varied in here[1:] for p in _problems(name, varied)]
        chosen = used if used in dict(here) else BASE
        batch_jobs[job.site] = tuple(
            SaeJob(job=other, folder=DICTIONARIES if name == chosen else f"{VARIANTS}/{name}")
            for name, other in here
        )
    if used != BASE and at.get(used) is not None:
        problems.append(
            Problem(
                what="the variant in use must be trained at all sites",
                where="train.used",
                found=used,
            )
        )
    if problems:
        raise UserError(
            "this sweep cannot be trained", problems=tuple(problems), fix="change train.sweep"
        )
    return batch_jobs


def transcoder_jobs(
    choice: Transcoders, store: ActivationStore, *, seed: int, learning_rate: float | None
) -> dict[Site, BatchJob]:
    """One SAE a block, from random directions of its own. Raises UserError for sites that are
    not stored."""
    sites = parse_sites(choice.sites, store.sites)
    batch_jobs, problems = dict[Site, BatchJob](), []
    for site in sites:
        reads = Site(site.layer, choice.reads)
        if site.kind != "mlp_out":
            problems.append(
                Problem(what="not an MLP output", where=site.short, expected=f"L{site.layer}.mlp")
            )
        elif reads not in store.sites:
            stored = ", ".join(other.short for other in store.sites)
            problems.append(
                Problem(
                    what="the input is not stored",
                    where=site.short,
                    expected=reads.short,
                    found=stored,
                )
            )
        problems += [
            Problem(what="impossible choice", where=site.short, found=what)
            for what in choice.architecture.problems(choice.n_latents)
        ]
        own = seed + 100_003 * (1 + site.layer)
        job = SiteJob(
            site=site,
            architecture=choice.architecture,
            n_latents=choice.n_latents,
            steps=choice.steps,
            learning_rate=choice.learning_rate
            or learning_rate
            or rate_at(site, choice.n_latents, choice.steps),
            seed=own,
            kind="independent",
            group=f"transcoder-{own}-{choice.n_latents}",
        )
        batch_jobs[site] = (SaeJob(job=job, folder=TRANSCODERS, reads=reads, skip=choice.skip),)
    if problems:
        fix = f'add "{choice.reads}" for these layers to collect.sites, or change train.transcoders'
        raise UserError("these transcoders cannot be trained", problems=tuple(problems), fix=fix)
    return batch_jobs


def _varied(job: SiteJob, variant: Variant, steps: int, learning_rate: float | None) -> SiteJob:
    """The variant's job. Its batches are those of `job`, whose seed it keeps."""
    n_latents = variant.n_latents or job.n_latents
    whole = max(steps, job.steps)
    rate = (
        job.learning_rate
        if n_latents == job.n_latents
        else learning_rate or rate_at(job.site, n_latents, whole)
    )
    varied = replace(
        job,
        architecture=variant.architecture or job.architecture,
        n_latents=n_latents,
        learning_rate=variant.learning_rate or rate,
        group=f"random-{job.seed}-{n_latents}",
    )
    return replace(varied, parent=None, steps=max(steps, job.steps)) if variant.sites else varied


def _problems(name: str, job: SiteJob) -> list[Problem]:
    impossible = job.architecture.problems(job.n_latents)
    return [
        Problem(what="impossible choice", where=f"{job.site.short} {name}", found=what)
        for what in impossible
    ]
