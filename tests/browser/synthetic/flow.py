"""The synthetic graph from afar: pairs of dictionaries, communities, trunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import HOSTILE_TEXTS, WORDS, World, label_of

BEGINS = ("first", "branch", "mlp", "attention", "both", "unexplained", "unread")


def write_flow(folder: Path, world: World) -> None:
    pairs = []
    for target, parts in world.links.items():
        for source in sorted({s for s, *_ in parts}):
            mine = [(t, c) for s, t, _, c, r in parts if s == source and r == 0]
            n = sum(len(t) for t, _ in mine)
            relation = {"resid_post": "residual", "mlp_out": "mlp", "attn_out": "attention"}[
                world.sites[source][1]
            ]
            pairs.append(
                _pair(
                    source,
                    target,
                    relation,
                    n,
                    world,
                    float(np.median(np.concatenate([c for _, c in mine]))),
                )
            )
    residual = [i for i, (_, kind) in enumerate(world.sites) if kind == "resid_post"]
    for a, source in enumerate(residual):
        for target in residual[a + 2 :: 4]:
            distance = world.sites[target][0] - world.sites[source][0]
            n = int(world.sizes.n_latents * 0.82**distance)
            pairs.append(
                {
                    **_pair(source, target, "residual", n, world, max(0.3, 0.88**distance)),
                    "adjacent": False,
                }
            )
    write_shard(folder, "flow/model", {"pairs": pairs, "settings": {"alpha": 0.01}})
    _write_communities(folder, world)
    _write_trunks(folder, world)


def _write_communities(folder: Path, world: World) -> None:
    rows = []
    for c in range(40):
        tokens = [8 + c, 9 + c, len(world.vocabulary) - 1 - c % 16]
        label = HOSTILE_TEXTS[c] if world.sizes.hostile and c < 3 else WORDS[c % len(WORDS)]
        n_by_site = [
            max(0, int(40 - c + 20 * np.sin((i + c) / 6))) if kind == "resid_post" else c % 3
            for i, (_, kind) in enumerate(world.sites)
        ]
        rows.append((-sum(n_by_site), c, label, n_by_site, [*tokens, *[0xFFFFFFFF] * 5]))
    rows.sort(key=lambda row: row[:2])
    write_shard(
        folder,
        "flow/communities",
        {"labels": [row[2] for row in rows]},
        id=np.array([row[1] for row in rows], np.uint32),
        n_by_site=np.array([row[3] for row in rows], np.uint16),
        token=np.array([row[4] for row in rows], np.uint32),
    )


def _write_trunks(folder: Path, world: World) -> None:
    """Walk the planted links: the parents of a layer are a permutation, so every feature has one
    child at most."""
    child: dict[tuple[int, int], tuple[int, int, float]] = {}
    linked_from: set[tuple[int, int]] = set()
    fed: dict[tuple[int, int], set[str]] = {}
    for site, parts in world.links.items():
        for source, targets, sources, cosines, rank in parts:
            kind = world.sites[source][1]
            for t, s, c in zip(targets.tolist(), sources.tolist(), cosines.tolist(), strict=True):
                if kind != "resid_post":
                    fed.setdefault((site, t), set()).add(kind)
                    continue
                linked_from.add((source, s))
                if rank == 0:
                    child[source, s] = (site, t, c)
    continued = {(site, t) for site, t, _ in child.values()}
    residual = [i for i, (_, kind) in enumerate(world.sites) if kind == "resid_post"]
    paths = []
    for site in residual:
        for f in range(world.sizes.n_latents):
            if (site, f) in continued or not (world.alive[site][f] or (site, f) in child):
                continue
            path = [(site, f, 0.0)]
            while path[-1][:2] in child:
                path.append(child[path[-1][:2]])
            paths.append(path)
    paths.sort(key=lambda path: -len(path))
    members = [member for path in paths for member in path]
    hostile = HOSTILE_TEXTS if world.sizes.hostile else ()
    labels = [
        hostile[i] if i < len(hostile) else label_of(world, *path[len(path) // 2][:2])
        for i, path in enumerate(paths)
    ]
    read = [i for i, (layer, _) in enumerate(world.sites) if (layer, "mlp_out") in world.sites]
    begin = [_begin(path[0][:2], residual, fed, read) for path in paths]
    end = [
        0 if path[-1][0] == residual[-1] else 1 if path[-1][:2] in linked_from else 2
        for path in paths
    ]
    written = {name: [0] * len(world.sites) for name in ("mlp", "attention", "both")}
    for place in continued:
        if place in fed:
            written[_how(fed[place])][place[0]] += 1
    modules = [
        {"site": i, "n_alive": world.sizes.n_latents - 1, "n_linked": 7}
        for i in range(len(world.sites))
        if i not in residual
    ]
    count = np.random.default_rng(5).integers(1, 50, len(members))
    write_shard(
        folder,
        "flow/trunks",
        {
            "begins": list(BEGINS),
            "ends": ["last", "joins", "ends"],
            "labels": labels,
            "written": written,
            "modules": modules,
        },
        length=np.array([len(path) for path in paths], np.uint16),
        begin=np.array([BEGINS.index(name) for name in begin], np.uint8),
        end=np.array(end, np.uint8),
        community=np.array([i % 40 if i % 5 else 0xFFFFFFFF for i in range(len(paths))], np.uint32),
        score=np.array([i % 256 for i in range(len(paths))], np.uint8),
        site=np.array([site for site, _, _ in members], np.uint16),
        latent=np.array([f for _, f, _ in members], np.uint16),
        cosine=np.array([round(c * 10000) for _, _, c in members], np.int16),
        count=count.astype(np.uint16),
    )


def _begin(
    first: tuple[int, int],
    residual: list[int],
    fed: dict[tuple[int, int], set[str]],
    read: list[int],
) -> str:
    if first[0] == residual[0]:
        return "first"
    if first in fed:
        return _how(fed[first])
    return "unexplained" if first[0] in read else "unread"


def _how(kinds: set[str]) -> str:
    return (
        "both"
        if len(kinds) == 2
        else {"mlp_out": "mlp", "attn_out": "attention"}[next(iter(kinds))]
    )


def _pair(
    source: int, target: int, relation: str, n: int, world: World, median: float
) -> dict[str, Any]:
    return {
        "source": source,
        "target": target,
        "relation": relation,
        "n_links": n,
        "n_possible": world.sizes.n_latents - 1,
        "median_cosine": median,
        "mutual": 0.8,
        "threshold": 0.41,
        "null_median": 0.2,
        "null_p99": 0.35,
        "agreement": 0.7,
        "initialisation": "same start",
        "adjacent": True,
    }
