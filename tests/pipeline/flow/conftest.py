"""Toy dictionaries whose flow is known: directions carried, rotated, split, merged, newborn and
dying across layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from featureflow.sites import Site
from sae import Sae, TopKActivation


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Dictionaries, the true links (source site, latent, target site, latent), and which targets
    are newborn."""

    dictionaries: dict[Site, Sae]
    links: set[tuple[str, int, str, int]]
    newborn: set[tuple[str, int]]
    died: set[tuple[str, int]]


def dictionary(rows: Tensor, k: int = 4, metadata: dict | None = None) -> Sae:
    rows = torch.nn.functional.normalize(rows, dim=1)
    n, d = rows.shape
    return Sae(
        W_enc=rows.clone(),
        b_enc=torch.zeros(n),
        W_dec=rows,
        b_dec=torch.zeros(d),
        b_in=torch.zeros(d),
        activation=TopKActivation(k=min(k, n)),
        metadata=metadata or {},
    )


def plant(
    *, d: int, n: int = 480, n_layers: int = 4, noise: float = 0.25, seed: int = 0
) -> Planted:
    """Residual dictionaries of `n` latents at each layer and MLP dictionaries holding what is
    newborn there.

    Of each layer's latents: 60 % carried, 10 % rotated to a cosine of 0.75, 4 % in pairs split from
    one, 3 % merged from two, the rest newborn. Every latent's row is moved by `noise` (relative
    norm) before normalising, as training would.
    """
    generator = torch.Generator().manual_seed(seed)

    def fresh(count: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(count, d, generator=generator), dim=1)

    def disturbed(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows + noise * fresh(len(rows)), dim=1)

    previous = fresh(n)
    dictionaries = {Site(0, "resid_post"): dictionary(disturbed(previous))}
    links, newborn, died = set(), set(), set()
    for layer in range(1, n_layers):
        order = torch.randperm(n, generator=generator).tolist()
        rows, parents = _descend(previous, order, fresh)
        place = torch.randperm(n, generator=generator)
        rows = rows[place]
        parents = [parents[i] for i in place.tolist()]
        site, before = Site(layer, "resid_post"), Site(layer - 1, "resid_post")
        born = [i for i, parent in enumerate(parents) if not parent]
        links |= {
            (before.short, p, site.short, i) for i, parent in enumerate(parents) for p in parent
        }
        newborn |= {(site.short, i) for i in born}
        died |= {
            (before.short, p) for p in set(range(n)) - {p for parent in parents for p in parent}
        }
        dictionaries[site] = dictionary(disturbed(rows))
        module = Site(layer, "mlp_out")
        filler = fresh(n // 2 - len(born))
        dictionaries[module] = dictionary(torch.cat([disturbed(rows[born]), filler]))
        links |= {(module.short, j, site.short, i) for j, i in enumerate(born)}
        previous = rows
    return Planted(dictionaries=dictionaries, links=links, newborn=newborn, died=died)


def _descend(previous: Tensor, order: list[int], fresh) -> tuple[Tensor, list[tuple[int, ...]]]:
    n = len(order)
    carried, rotated, n_split, n_merged = int(0.6 * n), int(0.1 * n), int(0.02 * n), int(0.03 * n)
    rows, parents = [previous[order[:carried]]], [(p,) for p in order[:carried]]
    at = carried
    turning = order[at : at + rotated]
    rows.append(0.75 * previous[turning] + (1 - 0.75**2) ** 0.5 * fresh(rotated))
    parents += [(p,) for p in turning]
    at += rotated
    for parent in order[at : at + n_split]:
        aside = fresh(1)[0]
        aside = torch.nn.functional.normalize(
            aside - (aside @ previous[parent]) * previous[parent], dim=0
        )
        rows.append(torch.stack([previous[parent] + 0.7 * aside, previous[parent] - 0.7 * aside]))
        parents += [(parent,), (parent,)]
    at += n_split
    for _ in range(n_merged):
        one, two = order[at], order[at + 1]
        rows.append((previous[one] + previous[two])[None])
        parents.append((one, two))
        at += 2
    left = n - len(parents)
    rows.append(fresh(left))
    parents += [()] * left
    return torch.nn.functional.normalize(torch.cat(rows), dim=1), parents


@pytest.fixture(name="plant")
def _plant():
    """The function that makes planted dictionaries."""
    return plant


@pytest.fixture(name="dictionary")
def _dictionary():
    """The function that makes a dictionary of decoder rows."""
    return dictionary
