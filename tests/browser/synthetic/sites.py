"""Overview, labels and links of one synthetic dictionary as shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.browser.synthetic.cards import write_cards
from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import World, label_of


def write_site(folder: Path, world: World, site: int, chains: dict[int, np.ndarray]) -> None:
    name = f"sites/{world.short(site)}"
    density = _write_overview(folder, world, site, chains, name)
    _write_labels(folder, world, site, name)
    _write_links(folder, world, site, name)
    write_cards(folder, world, site, name, density)


def _write_overview(
    folder: Path, world: World, site: int, chains: dict[int, np.ndarray], name: str
) -> np.ndarray:
    n, rng = world.sizes.n_latents, world.rng
    density = np.where(world.alive[site], 10.0 ** rng.uniform(-5, -1.2, n), 0).astype(np.float32)
    layer, _ = world.sites[site]
    fed = np.zeros(n, bool)
    carried = np.zeros(n, bool)
    for source, target, _, _, rank in world.links[site]:
        (carried if world.sites[source][1] == "resid_post" else fed)[
            target[np.full(len(target), rank == 0)]
        ] = True
    kind = np.where(carried & fed, 2, np.where(carried, 1, np.where(fed | (layer == 0), 3, 4)))
    kind[~world.alive[site]] = 0
    identity = chains.get(site, layer * 2**20 + np.arange(n))
    flags = (
        world.alive[site] * 1
        + (np.arange(n) % 3 == 0) * 2
        + (density > 0.1) * 8
        + (rng.random(n) < 0.06) * 16
    )
    n_in = sum(
        (np.bincount(target, minlength=n) for _, target, *_ in world.links[site]), np.zeros(n, int)
    )
    write_shard(
        folder,
        f"{name}/overview",
        {},
        density=density,
        max=(rng.gamma(3, 4, n) * world.alive[site]).astype(np.float32),
        **{"class": kind.astype(np.uint8)},
        birth=(identity // 2**20).astype(np.int16),
        death=np.full(n, world.sizes.n_layers - 1, np.int16),
        community=np.where(identity % 50 < 40, identity % 50, 65535).astype(np.uint16),
        n_in=n_in.astype(np.uint16),
        n_out=np.ones(n, np.uint16),
        flags=flags.astype(np.uint8),
    )
    return density


def _write_labels(folder: Path, world: World, site: int, name: str) -> None:
    n = world.sizes.n_latents
    labels = [label_of(world, site, latent) for latent in range(n)]
    ruled = np.array([label not in ("", "no simple rule") for label in labels])
    method = np.where(ruled, np.arange(n) % 3, 255).astype(np.uint8)
    score = np.where(ruled, 150 + np.arange(n) % 100, 255).astype(np.uint8)
    write_shard(folder, f"{name}/labels", {"labels": labels}, method=method, score=score)


def _write_links(folder: Path, world: World, site: int, name: str) -> None:
    n, rng = world.sizes.n_latents, world.rng
    parts = world.links[site]
    target = np.concatenate([t for _, t, *_ in parts] or [np.zeros(0, int)])
    source_site = np.concatenate([np.full(len(t), s) for s, t, *_ in parts] or [np.zeros(0, int)])
    source = np.concatenate([s for _, _, s, _, _ in parts] or [np.zeros(0, int)])
    cosine = np.concatenate([c for *_, c, _ in parts] or [np.zeros(0)])
    rank = np.concatenate([np.full(len(t), r) for _, t, _, _, r in parts] or [np.zeros(0, int)])
    order = np.lexsort((rank, target))
    target, source_site, source, cosine, rank = (
        x[order] for x in (target, source_site, source, cosine, rank)
    )
    kinds = [world.sites[s][1] for s in source_site]
    relation = np.array(
        [{"resid_post": 0, "mlp_out": 1, "attn_out": 2}[kind] for kind in kinds], np.uint8
    )
    tested = rng.random(len(target)) < 0.1
    e = len(target)
    write_shard(
        folder,
        f"{name}/flow",
        {},
        target_offset=np.searchsorted(target, np.arange(n + 1)).astype(np.uint32),
        source_site=source_site.astype(np.uint16),
        source=source.astype(np.uint16),
        relation=relation,
        rank=rank.astype(np.uint8),
        cosine=np.round(cosine * 10000).astype(np.int16),
        q=np.where(cosine > 0.4, 60, 5).astype(np.uint8),
        pearson=np.round((cosine - 0.1) * 10000).astype(np.int16),
        jaccard=np.round(np.clip(cosine - 0.3, 0, 1) * 10000).astype(np.uint16),
        margin=np.where(rank == 0, 4000, -32768).astype(np.int16),
        mutual=(rank == 0).astype(np.uint8),
        causal_success=np.where(tested, np.round(cosine * 200), 255).astype(np.uint8),
        causal_change=np.where(tested, cosine, np.nan).astype(np.float32),
        causal_n=np.where(tested, 40, 0).astype(np.uint16).reshape(e),
    )
