"""The synthetic graph from afar: pairs of dictionaries, communities with their ribbons, trunks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import HOSTILE_TEXTS, WORDS, World


def write_flow(folder: Path, world: World) -> None:
    pairs = []
    for target, parts in world.links.items():
        for source in sorted({s for s, *_ in parts}):
            mine = [(t, c) for s, t, _, c, r in parts if s == source and r == 0]
            n = sum(len(t) for t, _ in mine)
            relation = {"resid_post": "residual", "mlp_out": "mlp", "attn_out": "attention"}[world.sites[source][1]]
            pairs.append(
                _pair(source, target, relation, n, world, float(np.median(np.concatenate([c for _, c in mine]))))
            )
    residual = [i for i, (_, kind) in enumerate(world.sites) if kind == "resid_post"]
    for a, source in enumerate(residual):
        for target in residual[a + 2 :: 4]:
            distance = world.sites[target][0] - world.sites[source][0]
            n = int(world.sizes.n_latents * 0.82**distance)
            pairs.append({**_pair(source, target, "residual", n, world, max(0.3, 0.88**distance)), "adjacent": False})
    write_shard(folder, "flow/model", {"pairs": pairs, "settings": {"alpha": 0.01}})
    sites = range(len(world.sites))
    communities = []
    for c in range(40):
        tokens = [8 + c, 9 + c, len(world.vocabulary) - 1 - c % 16]
        label = HOSTILE_TEXTS[c] if world.sizes.hostile and c < 3 else WORDS[c % len(WORDS)]
        n_by_site = [int(40 - c + 20 * np.sin((i + c) / 6)) if world.sites[i][1] == "resid_post" else 0 for i in sites]
        n_by_site = [max(0, n) for n in n_by_site]
        communities.append(
            {
                "id": c,
                "label": label,
                "size": sum(n_by_site),
                "n_by_site": n_by_site,
                "features": [f"L{c % world.sizes.n_layers}/{c}"],
                "tokens": tokens,
            }
        )
    communities.sort(key=lambda item: -item["size"])
    ribbons = [
        {
            "source": a,
            "target": b,
            "community": item["id"],
            "n": int(0.8 * min(item["n_by_site"][a], item["n_by_site"][b])),
        }
        for a, b in itertools.pairwise(residual)
        for item in communities
    ]
    other = {"size": 900, "n_by_site": [30 if i in residual else 0 for i in sites]}
    write_shard(folder, "flow/communities", {"communities": communities, "ribbons": ribbons, "other": other})
    write_shard(folder, "flow/trunks", {"trunks": [_trunk(world, k) for k in range(2000)]})


def _pair(source: int, target: int, relation: str, n: int, world: World, median: float) -> dict[str, Any]:
    return {
        "source": source, "target": target, "relation": relation, "n_links": n, "n_possible": world.sizes.n_latents - 1,
        "median_cosine": median, "mutual": 0.8, "threshold": 0.41, "null_median": 0.2, "null_p99": 0.35,
        "agreement": 0.7, "initialisation": "same start", "adjacent": True,
    }  # fmt: skip


def _trunk(world: World, k: int) -> dict[str, Any]:
    rng, n = np.random.default_rng(k), world.sizes.n_latents
    length = max(2, int(world.sizes.n_layers * (1 - k / 2200)))
    first = int(rng.integers(0, world.sizes.n_layers - length + 1))
    cosine = np.clip(rng.normal(0.9, 0.06, length - 1), 0.3, 1)
    label = HOSTILE_TEXTS[k] if world.sizes.hostile and k < len(HOSTILE_TEXTS) else f"fires on {WORDS[k % len(WORDS)]}"
    return {
        "features": [f"L{layer}/{int(rng.integers(0, n - 1))}" for layer in range(first, first + length)],
        "cosine": [round(float(c), 4) for c in cosine],
        "density": [round(float(10 ** rng.uniform(-4, -2)), 6) for _ in range(length)],
        "label": label, "score": float(rng.random()), "product": float(cosine.prod()),
    }  # fmt: skip
