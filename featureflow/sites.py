"""Sites: the named places in a transformer where activations are read and edited, and the ids of
features there.

A site is written as TransformerLens writes it, `blocks.12.hook_resid_post`; in feature ids and on
pages it is short: `L12` (residual stream after block 12), `L12.mlp` (MLP output), `L12.attn`
(attention output), `L12.mlp_in` (what the MLP reads, after its norm), `L12.mlp_normalized` (the
same before the norm's gain), `L12.z` (the heads' outputs before the output projection, one after
another). A feature is `L12/402`, `L12.mlp/7`.

A module that is no language model has named sites: a name and its place in the order of
computation, `M0.conv1`, `M3.blocks.3.mlp`. They make one chain, so their kind is that of a stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

from featureflow.errors import UserError

SiteKind = Literal[
    "resid_pre", "z", "attn_out", "resid_mid", "mlp_normalized", "mlp_in", "mlp_out", "resid_post"
]
IN_LAYER: tuple[SiteKind, ...] = get_args(SiteKind)
"""The kinds in the order in which a layer computes them."""
_SHORT: dict[SiteKind, str] = {
    "resid_pre": ".pre",
    "z": ".z",
    "attn_out": ".attn",
    "resid_mid": ".mid",
    "mlp_normalized": ".mlp_normalized",
    "mlp_in": ".mlp_in",
    "mlp_out": ".mlp",
    "resid_post": "",
}
_INSIDE: dict[SiteKind, str] = {
    "mlp_in": "mlp.hook_in",
    "mlp_normalized": "ln2.hook_normalized",
    "z": "attn.hook_z",
}
"""Hooks inside a sublayer, whose long names are not `hook_<kind>`."""
_KIND_OF_SHORT = {short: kind for kind, short in _SHORT.items()}
_KIND_OF_HOOK = {_INSIDE.get(kind, f"hook_{kind}"): kind for kind in _SHORT}
_LONG_PATTERN = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_SHORT_PATTERN = re.compile(r"L(\d+)((?:\.\w+)?)")
_NAMED_PATTERN = re.compile(r"M(\d+)\.(\w[\w.+-]*)")


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in the model: `layer` counts blocks from 0, `kind` is the hook there; `called` is the
    name of a site that is no transformer's. `str(site)` is the long name; sites sort in the order
    of computation."""

    layer: int
    kind: SiteKind
    called: str = ""

    def __lt__(self, other: Site) -> bool:
        return self._place < other._place

    @property
    def _place(self) -> tuple[int, int]:
        return self.layer, IN_LAYER.index(self.kind)

    @property
    def name(self) -> str:
        if self.called:
            return self.short
        return f"blocks.{self.layer}.{_INSIDE.get(self.kind, f'hook_{self.kind}')}"

    @property
    def short(self) -> str:
        if self.called:
            return f"M{self.layer}.{self.called}"
        return f"L{self.layer}{_SHORT[self.kind]}"

    @property
    def is_residual(self) -> bool:
        """Whether it is a place of the residual stream itself. All other kinds are what a sublayer
        reads, computes or adds."""
        return self.kind.startswith("resid_")

    def __str__(self) -> str:
        return self.name


def residual_sites(sites: Iterable[Site]) -> list[Site]:
    """Those of the residual stream after a block."""
    return [site for site in sites if site.kind == "resid_post"]


@dataclass(frozen=True, order=True)
class FeatureId:
    """One latent of the dictionary at one site; `str(id)` is `L12/402`."""

    site: Site
    latent: int

    def __str__(self) -> str:
        return f"{self.site.short}/{self.latent}"


def named_site(place: int, name: str) -> Site:
    """The site `name` of any module, `place` counted from 0 in the order of computation."""
    return Site(place, "resid_post", name)


def parse_site(text: str) -> Site:
    """Read `blocks.12.hook_resid_post` or `L12`, `L12.mlp`, `M0.conv1`. Raises UserError with the
    accepted forms."""
    if match := _NAMED_PATTERN.fullmatch(text):
        return named_site(int(match[1]), match[2])
    for pattern, kinds in ((_LONG_PATTERN, _KIND_OF_HOOK), (_SHORT_PATTERN, _KIND_OF_SHORT)):
        if (match := pattern.fullmatch(text)) and match[2] in kinds:
            return Site(int(match[1]), kinds[match[2]])
    raise UserError(
        f"{text!r} is not a site",
        expected=f"blocks.<layer>.<{'|'.join(_KIND_OF_HOOK)}>, or "
        + ", ".join(f"L12{short}" for short in _SHORT.values())
        + "; M0.conv1 for a named site of any module",
    )


def parse_feature(text: str) -> FeatureId:
    """Read `L12/402`, `L12.mlp/7`. Raises UserError."""
    site, slash, latent = text.rpartition("/")
    if not slash or not latent.isdecimal():
        raise UserError(
            f"{text!r} is not a feature",
            expected="<site>/<latent>, for example L12/402 or L12.mlp/7",
        )
    return FeatureId(parse_site(site), int(latent))
