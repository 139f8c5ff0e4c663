"""Whether the arrays of a source fit together: every site is one file or the whole of one numbered
series, and rows are the same tokens at every site."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.store.foreign.pieces import Piece, site_name
from featureflow.errors import Problem, UserError
from featureflow.sites import parse_site

Pieces = Mapping[str, Sequence[Piece]]
_OF_LAYERS = re.compile(
    r"(.*[^a-z])?(layers?|blocks?|resid(_(pre|mid|post))?|(mlp|attn)(_(out|in))?|hidden_states?|h|l)",
    re.IGNORECASE,
)


def iter_problems(by_name: Pieces, rename: Mapping[str, str]) -> Iterator[Problem]:
    """Everything that does not fit."""
    sites: dict[str, list[str]] = {}
    for name in by_name:
        sites.setdefault(site_name(name, rename), []).append(name)
    for site, names in sites.items():
        if len(names) > 1:
            yield Problem(what="two arrays of one site", where=site, found=", ".join(names))
    yield from _iter_of_series(by_name)
    yield from _iter_between_sites(by_name)


def _iter_of_series(by_name: Pieces) -> Iterator[Problem]:
    """All sites of a series are in each of its files."""
    series: dict[str, dict[int, set[str]]] = {}
    totals: dict[str, set[int | None]] = {}
    for name, parts in by_name.items():
        numbers = {part.number for part in parts}
        if len({part.series for part in parts}) > 1 or len(numbers) != len(parts):
            files = ", ".join(sorted(part.where for part in parts))
            yield Problem(what="one site in files that are no series", where=name, found=files)
            continue
        for what, values in (
            ("width", {part.shape[-1] for part in parts}),
            ("dtype", {part.dtype for part in parts}),
            ("rank", {len(part.shape) for part in parts}),
        ):
            if len(values) > 1:
                found = ", ".join(sorted(map(str, values)))
                yield Problem(
                    what=f"the files of one site differ in {what}", where=name, found=found
                )
        for part in parts:
            is_by_layer = len(parts) == 1 and _layer_of(name) == part.number  # `layer_12` with L12
            if part.number is not None and not is_by_layer:
                series.setdefault(part.series, {}).setdefault(part.number, set()).add(name)
                totals.setdefault(part.series, set()).add(part.total)
    for name, present in series.items():
        yield from _iter_of_numbers(name, present, totals[name])


def _iter_of_numbers(
    series: str, present: Mapping[int, set[str]], totals: set[int | None]
) -> Iterator[Problem]:
    first, last = min(0 if 0 in present else 1, min(present)), max(present)
    of_layers = _OF_LAYERS.fullmatch(Path(series).name) and len(present) > 1
    if of_layers and any(_layer_of(name) is None for name in set().union(*present.values())):
        yield Problem(
            what="are these layers, or parts of one site?",
            where=series,
            found=", ".join(map(str, sorted(present)[:12])),
            expected="L0, L1, … for layers; L3-0, L3-1, … for the parts of one",
        )
    if stated := [total for total in totals if total is not None]:
        last = max(last, first + max(stated) - 1)
    missing = [str(each) for each in range(first, last + 1) if each not in present]
    if missing:
        expected = f"also {', '.join(missing[:12])}" + (" …" if len(missing) > 12 else "")
        what, found = "parts of a numbered series are missing", f"{len(present)} parts"
        yield Problem(what=what, where=series, found=found, expected=expected)
    sites = set().union(*present.values())
    for number, names in sorted(present.items()):
        for name in sorted(sites - names):
            yield Problem(what=f"part {number} has no rows of this site", where=f"{series}: {name}")


def _iter_between_sites(by_name: Pieces) -> Iterator[Problem]:
    """Rows must be the same tokens at every site."""
    lengths = {name: sum(part.n_rows for part in parts) for name, parts in by_name.items()}
    if len(set(lengths.values())) > 1:
        for name, n in lengths.items():
            what = f"the sites differ in length, rows must be the same tokens: {n} rows"
            yield Problem(what=what, where=name)
        return
    every = [part for parts in by_name.values() for part in parts]
    contexts = {part.n_context for part in every if part.n_context is not None}
    if len(contexts) > 1:
        found = ", ".join(map(str, sorted(contexts)))
        yield Problem(what="contexts of different length", found=f"{found} positions")
    by_number: dict[int, dict[str, int]] = {}
    for name, parts in by_name.items():
        for part in parts if len(parts) > 1 else ():
            by_number.setdefault(part.number or 0, {})[name] = part.n_rows
    for number, rows in sorted(by_number.items()):
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{name} {n}" for name, n in rows.items())
            yield Problem(what=f"part {number} has other rows at each site", found=found)


def _layer_of(name: str) -> int | None:
    try:
        return parse_site(name).layer
    except UserError:
        return None
