"""Sites: the named places in a transformer where activations are read and edited, and the ids of
features there.

A site is written as TransformerLens writes it, `blocks.12.hook_resid_post`; in feature ids and on
pages it is short: `L12` (residual stream after block 12), `L12.mlp` (MLP output), `L12.attn`
(attention output), `L12.mlp_in` (what the MLP reads, after its norm), `L12.mlp_normalized` (the
same before the norm's gain), `L12.z` (the heads' outputs before the output projection, one after
another). A feature is `L12/402`, `L12.mlp/7`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from featureflow.errors import UserError

SiteKind = Literal[
    "resid_post", "mlp_out", "attn_out", "resid_pre", "resid_mid", "mlp_in", "mlp_normalized", "z"
]
_SHORT: dict[SiteKind, str] = {
    "resid_post": "",
    "mlp_out": ".mlp",
    "attn_out": ".attn",
    "resid_pre": ".pre",
    "resid_mid": ".mid",
    "mlp_in": ".mlp_in",
    "mlp_normalized": ".mlp_normalized",
    "z": ".z",
}
_INSIDE: dict[SiteKind, str] = {
    "mlp_in": "mlp.hook_in",
    "mlp_normalized": "ln2.hook_normalized",
    "z": "attn.hook_z",
}
"""Hooks inside a sublayer, whose long names are not `hook_<kind>`."""
IN_LAYER: tuple[SiteKind, ...] = (
    "resid_pre",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_normalized",
    "mlp_in",
    "mlp_out",
    "resid_post",
)
"""The kinds in the order in which a layer computes them."""
_KIND_OF_SHORT = {short: kind for kind, short in _SHORT.items()}
_KIND_OF_HOOK = {_INSIDE.get(kind, f"hook_{kind}"): kind for kind in _SHORT}
_LONG_PATTERN = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_SHORT_PATTERN = re.compile(r"L(\d+)((?:\.\w+)?)")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the model: `layer` counts blocks from 0, `kind` is the hook there. `str(site)` is
    the long name."""

    layer: int
    kind: SiteKind

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{_INSIDE.get(self.kind, f'hook_{self.kind}')}"

    @property
    def short(self) -> str:
        return f"L{self.layer}{_SHORT[self.kind]}"

    @property
    def depth(self) -> int:
        """A number that grows along the computation."""
        return self.layer * len(IN_LAYER) + IN_LAYER.index(self.kind)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, order=True)
class FeatureId:
    """One latent of the dictionary at one site; `str(id)` is `L12/402`."""

    site: Site
    latent: int

    def __str__(self) -> str:
        return f"{self.site.short}/{self.latent}"


def parse_site(text: str) -> Site:
    """Read `blocks.12.hook_resid_post` or `L12`, `L12.mlp`. Raises UserError with the accepted
    forms."""
    for pattern, kinds in ((_LONG_PATTERN, _KIND_OF_HOOK), (_SHORT_PATTERN, _KIND_OF_SHORT)):
        if (match := pattern.fullmatch(text)) and match[2] in kinds:
            return Site(int(match[1]), kinds[match[2]])
    raise UserError(
        f"{text!r} is not a site",
        expected=f"blocks.<layer>.<{'|'.join(_KIND_OF_HOOK)}>, or "
        + ", ".join(f"L12{short}" for short in _SHORT.values()),
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
