"""Sites and a recipe in, one job per site out, each naming the site it starts from.

How dictionaries relate decides whether neighbouring layers line up (docs/training.md has the
measurement):

    Independent    every site starts from random directions of its own
    Shared         every site of one width starts from the same random directions
    Chain          the residual site in the middle trains long; its neighbours start from it and
    train briefly, and
                   so on outward, both ways at once; MLP and attention sites have one random start
                   of their own, or start from the residual dictionary of their layer (measured:
                   then what looks like a link from an MLP is inertia, docs/flow.md)

A job's `group` names the random start that it goes back to: two dictionaries of one group are alike
from the start, which the linker's idea of chance has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from typing_extensions import Doc

from featureflow.errors import Problem, UserError
from featureflow.settings import ByKind, Settings
from featureflow.sites import IN_LAYER, Site
from sae.architectures import AnyArchitecture
from sae.schedule import learning_rate_law

_STARTED_FROM_STREAM = ("mlp_out", "attn_out")
_SEEDED = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""The kinds whose seeds count through the layers, as they did before there were others."""


class Independent(Settings):
    """Every dictionary starts from random directions of its own."""

    kind: Literal["independent"] = "independent"


class Shared(Settings):
    """All dictionaries start from the same random directions and train for the full number of
    steps."""

    kind: Literal["shared"] = "shared"


class Chain(Settings):
    """A middle residual site trains for the full number of steps; the others start from their
    neighbour."""

    start_layer: Annotated[
        int | None, Ge(0), Doc("layer where the chain begins; none for the middle one")
    ] = None
    next_steps: Annotated[
        int, Gt(0), Doc("optimizer steps of a residual site that starts from its neighbour")
    ] = 200
    modules: Annotated[
        Literal["residual", "random"],
        Doc(
            "what MLP and attention sites start from: their layer's residual dictionary, or random "
            "directions of theirs"
        ),
    ] = "random"
    module_steps: Annotated[int, Gt(0), Doc("optimizer steps of an MLP or attention site")] = 600
    kind: Literal["chain"] = "chain"


Initialisation = Annotated[Independent | Shared | Chain, ByKind()]


class Override(Settings):
    """Choices that differ at some sites. What is none stays as it is elsewhere."""

    sites: Annotated[tuple[str, ...], Doc("sites or patterns: resid_post:0-5, mlp_out, L12.attn")]
    architecture: Annotated[AnyArchitecture | None, Doc("architecture at these sites")] = None
    n_latents: Annotated[int | None, Gt(0), Doc("latents at these sites")] = None
    steps: Annotated[int | None, Gt(0), Doc("optimizer steps at these sites")] = None
    learning_rate: Annotated[float | None, Gt(0), Doc("peak learning rate at these sites")] = None


@dataclass(frozen=True, kw_only=True)
class SiteJob:
    """What training one site needs to know. `parent` is the site whose dictionary it starts from,
    if any."""

    site: Site
    architecture: AnyArchitecture
    n_latents: int
    steps: int
    learning_rate: float
    seed: int
    kind: str
    group: str
    parent: Site | None = None


def plan_jobs(
    sites: Sequence[Site],
    *,
    architecture: AnyArchitecture,
    n_latents: int,
    steps: int,
    learning_rate: float | None,
    initialisation: Initialisation,
    overrides: Sequence[tuple[Sequence[Site], Override]],
    seed: int,
) -> tuple[SiteJob, ...]:
    """Jobs such that a parent comes before its children. `overrides` come with the sites that they
    name; later ones win. Raises UserError with every impossible choice."""
    jobs = []
    for site, parent in _parents(sites, initialisation).items():
        job = SiteJob(
            site=site,
            architecture=architecture,
            n_latents=n_latents,
            steps=_steps(site, parent, steps, initialisation),
            learning_rate=0.0,
            seed=seed + _seed_offset(site, initialisation),
            kind=initialisation.kind,
            group="",
            parent=parent,
        )
        jobs.append(_overridden(job, steps, learning_rate, overrides))
    jobs = [replace(job, group=_group(job)) for job in jobs]
    if problems := tuple(_problems(jobs)):
        raise UserError(
            "these dictionaries cannot be trained", problems=problems, fix="change the recipe"
        )
    return tuple(jobs)


def _parents(sites: Sequence[Site], initialisation: Initialisation) -> dict[Site, Site | None]:
    """The site each site starts from, parents first."""
    residual = sorted(site for site in sites if site.is_residual)
    if not isinstance(initialisation, Chain) or not residual:
        return dict.fromkeys(sorted(sites))
    first = _first_of_chain(residual, initialisation)
    parents: dict[Site, Site | None] = {residual[first]: None}
    for up, down in zip(
        range(first + 1, len(residual) + first + 1),
        range(first - 1, -len(residual), -1),
        strict=False,
    ):
        if up < len(residual):
            parents[residual[up]] = residual[up - 1]
        if down >= 0:
            parents[residual[down]] = residual[down + 1]
    for site in sorted(site for site in sites if not site.is_residual):
        parents[site] = (
            _residual_of(site, residual)
            if initialisation.modules == "residual" and site.kind in _STARTED_FROM_STREAM
            else None
        )
    return parents


def _first_of_chain(residual: Sequence[Site], chain: Chain) -> int:
    if chain.start_layer is None:
        return (len(residual) - 1) // 2
    layers = [site.layer for site in residual]
    if chain.start_layer not in layers:
        raise UserError(
            "the chain cannot begin there",
            where="train.initialisation.start_layer",
            expected=f"a layer with a residual site: {', '.join(map(str, sorted(set(layers))))}",
            found=str(chain.start_layer),
        )
    return len(layers) - 1 - layers[::-1].index(chain.start_layer)


def _residual_of(site: Site, residual: Sequence[Site]) -> Site:
    """The residual site a module writes to: the first one after it, else the last."""
    return next((other for other in residual if other > site), residual[-1])


def _steps(site: Site, parent: Site | None, steps: int, initialisation: Initialisation) -> int:
    if isinstance(initialisation, Chain) and not site.is_residual:
        return initialisation.module_steps
    return (
        initialisation.next_steps
        if isinstance(initialisation, Chain) and parent is not None
        else steps
    )


def _seed_offset(site: Site, initialisation: Initialisation) -> int:
    """0 for the start that most sites share; modules of a chain share another, independent sites
    have one each."""
    match initialisation:
        case Independent():
            return 1 + _place(site)
        case Chain(modules="random") if not site.is_residual:
            return 1
        case _:
            return 0


def _overridden(
    job: SiteJob,
    steps: int,
    learning_rate: float | None,
    overrides: Sequence[tuple[Sequence[Site], Override]],
) -> SiteJob:
    """What the recipe says of this site. A dictionary that goes on from another keeps to the rate
    of a whole run."""
    for named, override in overrides:
        if job.site in named:
            wanted = {
                name: getattr(override, name) for name in ("architecture", "n_latents", "steps")
            }
            job = replace(
                job, **{name: value for name, value in wanted.items() if value is not None}
            )
            learning_rate = override.learning_rate or learning_rate
    whole = max(steps, job.steps) if job.parent else job.steps
    return replace(job, learning_rate=learning_rate or rate_at(job.site, job.n_latents, whole))


def rate_at(site: Site, n_latents: int, steps: int) -> float:
    """The law's rate; an attention output in a short run gets that of 3,000 steps, since at more a
    quarter to a half of its latents die (docs/history/training.md)."""
    return learning_rate_law(n_latents, max(steps, 3000) if site.kind == "attn_out" else steps)


def _group(job: SiteJob) -> str:
    """The name of the random start a job goes back to. The width and the seed make the start; one
    in the heads' space is none in the stream."""
    return f"random-{job.seed}-{job.n_latents}{'-z' if job.site.kind == 'z' else ''}"


def _problems(jobs: Sequence[SiteJob]) -> list[Problem]:
    by_site = {job.site: job for job in jobs}
    problems = []
    for job in jobs:
        impossible = job.architecture.problems(job.n_latents)
        problems += [
            Problem(what="impossible choice", where=job.site.short, found=what)
            for what in impossible
        ]
        if job.parent is not None and by_site[job.parent].n_latents != job.n_latents:
            widths = f"{job.n_latents}, and {by_site[job.parent].n_latents} at {job.parent.short}"
            problems.append(
                Problem(
                    what="a chain keeps one width",
                    where=job.site.short,
                    found=widths,
                    expected="the same n_latents",
                )
            )
    return problems


def _place(site: Site) -> int:
    """A number of the site's own."""
    if site.kind in _SEEDED:
        return site.layer * len(_SEEDED) + _SEEDED.index(site.kind)
    return 1_000_000 + site.layer * len(IN_LAYER) + IN_LAYER.index(site.kind)
