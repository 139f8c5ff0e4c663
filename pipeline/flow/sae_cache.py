"""SAEs in use → their directions and codes, read when first needed, a few kept.

Pairs are linked in order of depth, so that each dictionary is read once or twice and no more than
`n_kept` are held. What is learnt about a dictionary on the way (who is alive, what is odd) is kept
for the node table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.flow.directions import Directions, directions_of, sae_directions
from pipeline.flow.functional import Codes, encode_tokens
from pipeline.flow.nodes import Side
from pipeline.flow.pairing import Pair
from sae import Sae

_RIDGE = 1e-3
"""Of the mean variance of a coordinate, in the map between sites of different width."""
Decoders = Callable[[Site, Site], Float[Tensor, "latent d_out"] | None]
"""What the latents of one site write into another (sae/formats/native_cross_layer.py)."""
HeldOut = Callable[[Site], Iterable[Float[Tensor, "token d_in"]]]
"""Batches of held-out activations at a site; every site must give the same tokens in the same
order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dictionary as linking sees it: living directions, and codes of the held-out tokens (None
    without tokens)."""

    directions: Directions
    codes: Codes | None


@dataclass(kw_only=True)
class SaeCache:
    """The dictionaries of a run. `sides` and `warnings` grow as dictionaries are read."""

    dictionaries: Mapping[Site, Sae]
    held_out: HeldOut | None = None
    projections: Mapping[Site, Tensor] = field(default_factory=dict)
    decoders: Decoders | None = None
    device: str = "cpu"
    n_kept: int = 5
    warnings: list[str] = field(default_factory=list)
    sides: dict[Site, Side] = field(default_factory=dict)
    _recent: dict[Site, Entry] = field(default_factory=dict)

    def at(self, site: Site) -> Entry:
        """The dictionary at a site; read again only if several others were asked for since."""
        entry = self._recent.pop(site, None) or self._read(site)
        while len(self._recent) >= self.n_kept:
            self._recent.pop(next(iter(self._recent)))
        self._recent[site] = entry
        return entry

    def carried(self, pair: Pair) -> Directions:
        """The source's directions in the target's space: for a layer of a crosscoder its decoder
        into the target's site. Where two named sites differ in width they go through the linear map
        that best predicts the target's held-out activations. Raises UserError without held-out
        tokens."""
        if (written := self._written(pair)) is not None:
            return written
        source, target = self.at(pair.source).directions, self.at(pair.target).directions
        if source.d_model == target.d_model or not pair.source.called:
            return source
        if self.held_out is None:
            raise UserError(
                f"{pair}: sites of different width are linked through held-out activations",
                where="link.functional_tokens",
                expected="above 0",
            )
        x, y = (torch.cat(list(self.held_out(site))) for site in (pair.source, pair.target))
        x, y = x - x.mean(0), y - y.mean(0)
        moment = x.T @ x
        moment.diagonal().add_(_RIDGE * moment.diagonal().mean())
        sae, projection = self.dictionaries[pair.source], torch.linalg.solve(moment, x.T @ y)
        name = pair.source.short
        whole = sae_directions(sae, name=name, projection=projection, device=self.device)
        return whole.restricted(source.usable)

    def _written(self, pair: Pair) -> Directions | None:
        sae = self.dictionaries[pair.source]
        if self.decoders is None or "cross_layer" not in sae.metadata:
            return None
        if (rows := self.decoders(pair.source, pair.target)) is None:
            return None
        found = directions_of(rows, name=str(pair), encoder=sae.W_enc, device=self.device)
        self.warnings.extend(found.warnings)
        codes = self.at(pair.source).codes
        return found if codes is None else found.restricted(torch.from_numpy(codes.n_fired > 0))

    def _read(self, site: Site) -> Entry:
        sae = self.dictionaries[site]
        whole = sae_directions(
            sae, name=site.short, projection=self.projections.get(site), device=self.device
        )
        codes = None if self.held_out is None else encode_tokens(sae, self.held_out(site))
        fired = (
            whole.usable
            if codes is None
            else torch.from_numpy(codes.n_fired > 0).to(whole.usable.device)
        )
        living = whole.restricted(fired)
        if site not in self.sides:
            self._note(site, whole, living, codes)
        return Entry(directions=living, codes=codes)

    def _note(self, site: Site, whole: Directions, living: Directions, codes: Codes | None) -> None:
        self.sides[site] = Side(
            site=site,
            alive=living.usable.cpu().numpy(),
            n_fired=None if codes is None else codes.n_fired,
            n_tokens=0 if codes is None else codes.n_tokens,
            mean_share=whole.mean_share,
            n_duplicates=whole.n_duplicates,
            codes=codes if site.is_residual else None,
        )
        self.warnings.extend(whole.warnings)
        if n_silent := int((whole.usable & ~living.usable).sum()):
            self.warnings.append(
                f"{site.short}: {n_silent} latents are never active on held-out tokens; left out"
            )
        if not bool(living.usable.any()):
            self.warnings.append(f"{site.short}: no latent is alive; the site has no links")
