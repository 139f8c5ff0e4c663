"""Sites as a recipe writes them: patterns in, sites of a model out.

`resid_post` is that kind at every layer, `mlp_out:0,5,10` at some, `attn_out:0-29/3` at every third
of a range, and `L12.mlp` or `blocks.12.hook_mlp_out` one site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from featureflow.errors import Problem, UserError
from featureflow.sites import Site, parse_site

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?")
_FORMS = "resid_post, mlp_out:0,5,10, attn_out:0-29/3, L12.mlp or blocks.12.hook_mlp_out"


def parse_sites(patterns: Sequence[str], available: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that the patterns name, in the order of the model, each once. Raises UserError with
    all problems."""
    chosen: set[Site] = set()
    problems: list[Problem] = []
    for pattern in patterns:
        try:
            sites = set(_iter_sites(pattern.strip(), available))
        except UserError as error:
            problems.extend(error.problems)
            continue
        problems += [
            Problem(
                what="there is no such site",
                where=pattern,
                found=site.name,
                expected=_span(available),
            )
            for site in sorted(sites - set(available))
        ]
        chosen |= sites
    if not patterns:
        problems.append(Problem(what="no site is named", where="sites", expected=_FORMS))
    if problems:
        raise UserError("these sites cannot be used", problems=tuple(problems))
    return tuple(site for site in available if site in chosen)


def _iter_sites(pattern: str, available: Sequence[Site]) -> Iterator[Site]:
    name, colon, layers = pattern.partition(":")
    kinds = {site.kind: site.kind for site in available}
    kind = kinds.get(name)  # type: ignore[call-overload]  # any text may be asked for
    if kind is None:
        yield _single(pattern, set(kinds))
    elif not colon:
        yield from (site for site in available if site.kind == kind)
    else:
        there = {site.layer: site for site in available if site.kind == kind}
        for part in layers.split(","):
            named = _layers(part.strip(), pattern)
            yield from (there.get(layer, Site(layer, kind)) for layer in named)


def _single(pattern: str, kinds: set[str]) -> Site:
    try:
        return parse_site(pattern)
    except UserError:
        expected = f"{_FORMS}; kinds there are: {', '.join(sorted(kinds))}"
        raise UserError(
            "not a site or a pattern of sites", where=pattern, expected=expected
        ) from None


def _layers(part: str, pattern: str) -> range:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise UserError(
            "not a layer or a range of layers",
            where=pattern,
            found=part,
            expected="0,5,10 or 0-29 or 0-29/3",
        )
    first = int(match[1])
    return range(first, int(match[2] or first) + 1, int(match[3] or 1))


def _span(available: Sequence[Site]) -> str:
    """`resid_post:0-29, mlp_out:2,6,10`: each kind with the layers it is at, as a pattern may say
    it."""
    layers: dict[str, list[int]] = {}
    for site in available:
        layers.setdefault(site.kind, []).append(site.layer)
    return ", ".join(f"{kind}:{_listed(sorted(each))}" for kind, each in layers.items())


def _listed(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ",".join(map(str, layers))
