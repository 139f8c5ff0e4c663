"""Gradients of one number with respect to the activations at sites, by one backward pass.

1. The earliest site is cut: its activation becomes a leaf, so nothing before it is differentiated.
2. Later sites are seen as they pass; the number that `objective` makes of logits and of what was
   seen is differentiated with respect to all of them at once.
3. Gradient × activation: a feature's share of the number is z_i d_i·g. It is the tangent of really
   removing the feature (on SmolLM2, single latents: rank correlation 0.97 over 4 and 12 layers).

Nothing is frozen or rescaled: no rules of layer-wise relevance propagation, which are patented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.sites import Site

Stream = Mapping[Site, Float[Tensor, "batch position d_model"]]


class _Seen(Exception):
    """Raised once the last wanted site was seen; never leaves this module."""


def gradients(
    model: LanguageModel,
    ids: Int[Tensor, "batch position"],
    sites: Sequence[Site],
    objective: Callable[[Tensor, Stream], Tensor],
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Activations at `sites` and the gradient of `objective(logits, activations)` there; zeros
    where the number does not depend on a site."""
    stream: dict[Site, Tensor] = {}
    with torch.enable_grad(), _frozen(model), model.edited(_kept(sites, stream)):
        logits = model.hf(input_ids=ids.to(model.device), use_cache=False).logits
        return _differentiated(objective(logits, stream), stream)


def gradients_between(
    model: LanguageModel,
    residual: Float[Tensor, "batch position d_model"],
    source: Site,
    target: Site,
    objective: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch position d_model"]:
    """The gradient, with respect to the residual stream after a layer, of a number made of the
    activation at a later site. Only what lies between the two is computed."""
    start = residual.detach().to(model.device, model.dtype).requires_grad_()
    seen: list[Tensor] = []

    def stop(value: Tensor) -> Tensor:
        seen.append(value)
        raise _Seen

    with (
        torch.enable_grad(),
        _frozen(model),
        continued_from(model, source.layer, start),
        model.edited({target: stop}),
        suppress(_Seen),
    ):
        shape = torch.zeros(residual.shape[:2], dtype=torch.int64, device=model.device)
        model.base(shape, use_cache=False)
    [found] = torch.autograd.grad(objective(seen[0]), [start])
    return found


def _kept(sites: Sequence[Site], stream: dict[Site, Tensor]) -> dict[Site, Callable]:
    first = min(sites)

    def keep(site: Site, h: Tensor) -> Tensor:
        stream[site] = h.detach().requires_grad_() if site == first else h.view_as(h)
        return stream[site]

    return {site: partial(keep, site) for site in sites}


def _differentiated(
    number: Tensor, stream: dict[Site, Tensor]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    found = torch.autograd.grad(number, list(stream.values()), allow_unused=True)
    seen = {site: h.detach() for site, h in stream.items()}
    gradient = {
        site: torch.zeros_like(h) if g is None else g
        for (site, h), g in zip(seen.items(), found, strict=True)
    }
    return seen, gradient


@contextmanager
def _frozen(model: LanguageModel) -> Iterator[None]:
    """Weights take no gradient inside."""
    wanted = [each for each in model.hf.parameters() if each.requires_grad]
    for each in wanted:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in wanted:
            each.requires_grad_(True)
