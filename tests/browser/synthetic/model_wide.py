"""What all synthetic dictionaries share: token search, steering samples, the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.browser.synthetic import traces
from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import HOSTILE_TEXTS, World


def write_search(folder: Path, world: World) -> None:
    v, rng = len(world.vocabulary), world.rng
    per = np.full(1024, 0)
    per[:v] = 6
    e = int(per.sum())
    weight = np.tile(np.linspace(250, 40, 6), v).astype(np.uint8)
    write_shard(
        folder,
        "search/tokens/000",
        {},
        offset=np.concatenate([[0], per.cumsum()]).astype(np.uint32),
        site=rng.integers(0, len(world.sites), e).astype(np.uint16),
        latent=rng.integers(0, world.sizes.n_latents - 1, e).astype(np.uint16),
        kind=(np.arange(e) % 2).astype(np.uint8),
        weight=weight,
    )


def write_scores(folder: Path, world: World) -> None:
    """What a sentence model and a chat model say of one feature; the chat model's label is
    hostile."""
    label = {
        "text": HOSTILE_TEXTS[0] if world.sizes.hostile else "names of harbours",
        "method": "model",
        "model": "stub",
        "score": 0.85,
        "low": 0.64,
        "high": 0.95,
        "n": 19,
    }
    found = {
        "examples_score": 0.93,
        "label_score": None,
        "n_firing": 9,
        "n_silent": 10,
        "labels": [label],
    }
    write_shard(folder, "attached/scores", {"version": 1, "features": {"L2/30": found}})


def write_steering(folder: Path, world: World) -> None:
    layer = world.sizes.n_layers // 2
    feature = f"L{layer}/30"
    samples = [
        {
            "feature": feature,
            "label": "active on harbour",
            "arm": arm,
            "dose": dose,
            "schedule": "constant",
            "features": [f"L{layer - 1}/3", feature],
            "seed": seed,
            "prompt": "The weather was",
            "unsteered": " cold and the road was empty.",
            "steered": HOSTILE_TEXTS[seed] + " near the harbour, harbour harbour.",
            "measure": {"name": "own tokens per 100", "unsteered": 1.2, "steered": 9.0},
        }
        for arm in ("single layer", "flow additive")
        for dose in (0.1, 0.4)
        for seed in range(3)
    ]
    effects = [
        {
            "feature": feature,
            "arm": arm,
            "dose": dose,
            "name": "own tokens per 100",
            "mean": 8 * dose + k,
            "low": 6 * dose,
            "high": 10 * dose + 2,
            "n": 64,
        }
        for k, arm in enumerate(("single layer", "flow additive"))
        for dose in (0.1, 0.2, 0.4)
    ]
    commands = {feature: f"featureflow steer --steer.features '[\"{feature}\"]'"}
    write_shard(
        folder,
        "attached/steering",
        {"version": 1, "samples": samples, "effects": effects, "commands": commands},
    )


def write_lenses(folder: Path, world: World) -> None:
    """What a planted lens found: hostile texts everywhere, and a column for features of L2."""
    texts = HOSTILE_TEXTS if world.sizes.hostile else ("calm",) * len(HOSTILE_TEXTS)
    rows = [[f"L2/{i}", "L2", (i * 7) % 5 + 0.5, text] for i, text in enumerate(texts)]
    kinds = {"feature": "feature", "site": "site", "depth": "number", texts[0]: "text"}
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40">'
        "<script>top.hacked = 6</script><rect width='60' height='40' onload='top.hacked=7'/></svg>"
    )
    found = {
        "title": f"Depth {texts[1]}",
        "text": f"# {texts[2]}\n\nOne sentence {texts[0]}.\n\n- {texts[3]}\n- second\n",
        "headline": {"median_depth": 0.62, texts[4]: texts[5]},
        "figure": svg,
        "tables": [
            {
                "name": "depth",
                "n_rows": 9000,
                "columns": [{"name": name, "kind": kind} for name, kind in kinds.items()],
                "rows": [*rows, ["L99/1", "L99", None, None]],
            }
        ],
    }
    write_shard(folder, "lenses/planted", found)
    n = world.sizes.n_latents
    shared = {"lens": "planted", "title": found["title"]}
    columns = [
        {**shared, "name": "depth"},
        {**shared, "name": texts[0], "texts": [None] * 30 + [texts[2]] + [None] * (n - 31)},
    ]
    depth = np.full(n, np.nan, dtype=np.float32)
    depth[30] = 0.25
    write_shard(folder, "sites/L2/lenses", {"columns": columns}, **{"0": depth})


def manifest(world: World) -> dict[str, Any]:
    sizes = world.sizes
    n = sizes.n_latents
    sites = [
        {
            "site": f"blocks.{layer}.hook_{kind}",
            "short": world.short(i),
            "layer": layer,
            "kind": kind,
            "n_latents": n,
            "n_alive": n - 1,
            "n_labelled": n // 3,
            "n_cards": -(-n // 256),
            "n_dying": n // 16,
            "classes": {
                "translated": int(n * 0.6),
                "processed": int(n * 0.2),
                "newborn": int(n * 0.15),
                "unexplained": n // 20,
            },
            "metrics": {"fvu": 0.21, "l0": 32.0, "dead": 1},
            "lenses": world.short(i) == "L2",
        }
        for i, (layer, kind) in enumerate(world.sites)
    ]
    return {
        "format": "featureflow-atlas",
        "version": 2,
        "title": f"Synthetic · {len(sites)} dictionaries",
        "profile": "standard",
        "model": {
            "name": "synthetic-model",
            "fingerprint": "0" * 16,
            "n_layers": sizes.n_layers,
            "d_model": 64,
            "d_vocab": len(world.vocabulary),
            "n_context": sizes.n_context,
        },
        "corpus": {
            "n_tokens": len(world.tokens),
            "n_tokens_seen": len(world.tokens) - 64,
            "n_documents": sizes.n_documents,
            "rows_per_shard": sizes.rows_per_shard,
            "n_shards": -(-len(world.tokens) // sizes.rows_per_shard),
            "sources": [
                {"name": name, "n_tokens": 1000, "n_documents": 20}
                for name in ("wiki", "code", "<b>books</b>")
            ],
            "labels": [{"name": "physics", "n_tokens": 1000}, {"name": "music", "n_tokens": 1000}],
            "filters": {"drop_bos": True, "drop_special": True, "drop_sinks": True},
            "n_dropped": {"bos": 64, "sink": 3},
            "holdout": 0.333,
        },
        "sites": sites,
        "cards_per_shard": 256,
        "window": 24,
        "example_tabs": ["top", "decile", "uniform", "near_miss"],
        "histogram": {"log2_low": -16, "bins_per_octave": 2, "n_bins": 64},
        "position_edges": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128],
        "position_totals": [500] * 15,
        "source_totals": [1000] * 3,
        "label_totals": [1000] * 2,
        "label_methods": [
            {"name": "token", "kind": "rule", "about": "active on these tokens"},
            {"name": "previous token", "kind": "rule", "about": "active after these tokens"},
            {"name": "inherited", "kind": "flow", "about": "label of the linked feature"},
        ],
        "classes": ["unknown", "translated", "processed", "newborn", "unexplained"],
        "relations": ["residual", "mlp", "attention"],
        "search": {"tokens_per_shard": 1024, "shards": [0]},
        "has": {"flow": True, "communities": True, "trunks": True},
        "lenses": [{"name": "planted", "title": f"Depth {HOSTILE_TEXTS[1]}"}],
        "traces": traces.entries(),
        "headline": {
            "n_features": n * len(sites),
            "n_alive": (n - 1) * len(sites),
            "n_labelled": n // 3 * len(sites),
            "n_links": 210000,
            "fvu_median": 0.2134,
        },
        "provenance": {
            "collect": "c" * 64,
            "train": "t" * 64,
            "link": "l" * 64,
            "evaluate": None,
            "made_by": {"versions": {"torch": "2.13"}},
        },
        "licences": ["Synthetic text, no rights reserved"],
    }
