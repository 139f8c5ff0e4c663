"""Feature cards of one synthetic dictionary as shards, examples included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.browser.synthetic.shards import container, write_payload
from tests.browser.synthetic.world import HOSTILE_TEXTS, World, label_of


def write_cards(folder: Path, world: World, site: int, name: str, density: np.ndarray) -> None:
    n = world.sizes.n_latents
    for first in range(0, n, 256):
        if first and not world.sizes.full_cards:
            raw = world.first_card  # the same columns again; only for timings
            payload = raw.replace(b'"first": 0,', b'"first": %d,' % first, 1)
            width = 8 + int.from_bytes(raw[4:8], "little")
            payload = _repad(payload, width - len(raw) + len(payload))
            write_payload(folder, f"{name}/cards/{first // 256:03d}", payload)
            continue
        latents = np.arange(first, min(first + 256, n))
        labels = [_card_labels(world, site, int(latent)) for latent in latents]
        document = {"first": first, "n": len(latents), "labels": labels}
        payload = container(document, **_card_columns(world, site, latents, density[latents]))
        world.first_card = payload if first == 0 else world.first_card
        write_payload(folder, f"{name}/cards/{first // 256:03d}", payload)


def _repad(payload: bytes, end: int) -> bytes:
    header = payload[8:end].rstrip(b" ")
    header += b" " * (-len(header) % 8)
    return payload[:4] + len(header).to_bytes(4, "little") + header + payload[end:]


def _card_labels(world: World, site: int, latent: int) -> list[dict[str, Any]]:
    text = label_of(world, site, latent)
    base = {
        "score": 0.81,
        "low": 0.74,
        "high": 0.87,
        "n": 210,
        "precision": 0.9,
        "recall": 0.75,
        "near_miss": 0.8,
    }
    inherited = {
        "text": "days of the week",
        "method": 2,
        "from": "L0/3",
        "cosine": 0.93,
        "accepted": True,
        **base,
    }
    if text in ("", "no simple rule"):
        return (
            []
            if not text
            else [
                {"text": text, "method": 0, "score": None, "n": 0, "accepted": False, "from": None},
                inherited,
            ]
        )
    return [{"text": text, "method": latent % 3, "accepted": True, "from": None, **base}, inherited]


def _card_columns(
    world: World, site: int, latents: np.ndarray, density: np.ndarray
) -> dict[str, np.ndarray]:
    rng, n, v = world.rng, len(latents), len(world.vocabulary)
    alive = world.alive[site][latents]
    count = np.maximum(np.round(density * len(world.tokens)), alive).astype(np.uint32)
    top = rng.gamma(3, 4, n).astype(np.float32) * alive
    shares = np.sort(rng.dirichlet(np.full(12, 0.5), n), axis=1)[:, ::-1]
    histogram = np.zeros((n, 64), np.uint32)
    for i in range(n):
        bins = np.clip(np.round(rng.normal(34, 3, min(int(count[i]), 400))), 0, 63).astype(int)
        np.add.at(histogram[i], bins, 1)
    tokens = rng.integers(1, v, (n, 12)).astype(np.uint32)
    tokens[:, 9:] = 4294967295
    if world.sizes.hostile:
        tokens[:, 0] = v - 1 - latents % (len(HOSTILE_TEXTS) + 2)
    near = rng.integers(0, len(world.sites) and world.sizes.n_latents - 1, (n, 8)).astype(np.uint32)
    falling = np.linspace(0.9, 0.1, 8, dtype=np.float32)[None].repeat(n, 0)
    scores = np.linspace(6, 2, 10, dtype=np.float32)[None].repeat(n, 0)
    columns = {
        "count": count,
        "n_documents": np.minimum(count, 60).astype(np.uint32),
        "mean": top * 0.4,
        "std": top * 0.2,
        "max": top,
        "decile": np.where(
            alive[:, None], np.linspace(0.05, 1, 11)[None] * top[:, None], np.nan
        ).astype(np.float32),
        "threshold": np.full(n, np.nan, np.float32),
        "histogram": histogram,
        "token": tokens,
        "token_share": shares.astype(np.float32),
        "token_lift": (shares * 8).astype(np.float32),
        "token_count": (shares * 100).astype(np.uint32),
        "previous": rng.integers(1, v, (n, 8)).astype(np.uint32),
        "previous_share": shares[:, :8].astype(np.float32),
        "previous_lift": (shares[:, :8] * 5).astype(np.float32),
        "previous_count": (shares[:, :8] * 100).astype(np.uint32),
        "position": rng.integers(0, 40, (n, 15)).astype(np.uint32),
        "source": rng.integers(0, 40, (n, 3)).astype(np.uint32),
        "topic": rng.integers(0, 40, (n, 2)).astype(np.uint32),
        "promotes": rng.integers(1, v, (n, 10)).astype(np.uint32),
        "promotes_score": scores,
        "suppresses": rng.integers(1, v, (n, 10)).astype(np.uint32),
        "suppresses_score": -scores,
        "output_kurtosis": rng.gamma(1, 3, n).astype(np.float32),
        "cofiring": near,
        "cofiring_jaccard": falling,
        "similar": near[:, ::-1],
        "similar_cosine": falling,
    }
    return columns | _examples(world, n, alive, top)


def _examples(world: World, n: int, alive: np.ndarray, top: np.ndarray) -> dict[str, np.ndarray]:
    rng = world.rng
    plan = [(0, 255)] * 8 + [(1, d) for d in range(9, -1, -1)] + [(2, 255)] * 4 + [(3, 255)] * 2
    e = len(plan)
    per = np.where(alive, e, 0)
    rows = rng.integers(0, len(world.tokens), (n, e))[alive].ravel()
    tab = np.tile([t for t, _ in plan], int(alive.sum())).astype(np.uint8)
    decile = np.tile(
        [9 if t == 0 else (5 if t == 2 else d) for t, d in plan], int(alive.sum())
    ).astype(np.uint8)
    share = np.where(tab == 0, 1 - 0.02 * (np.arange(len(rows)) % e), (decile + 1) / 11)
    share = np.where(tab == 3, 0.02, share)
    room = world.sizes.n_context
    offsets, values, starts = [], [], [0]
    for i, row in enumerate(rows):
        position = int(row) % room
        low, high = max(-24, -position), min(24, room - 1 - position)
        near = {int(x) for x in rng.integers(low, high + 1, 4)}
        near = (near - {0}) if tab[i] == 3 else (near | {0})
        for at in sorted(near):
            offsets.append(at)
            values.append(max(1, int(255 * share[i] * (1 if at == 0 else rng.random()))))
        starts.append(len(offsets))
    return {
        "example_offset": np.concatenate([[0], per.cumsum()]).astype(np.uint32),
        "example_tab": tab,
        "example_decile": np.where(tab == 3, 255, decile).astype(np.uint8),
        "example_row": rows.astype(np.uint32),
        "example_value": (share * np.repeat(top[alive], e)).astype(np.float32),
        "example_gap": np.where(tab == 3, 0.1, np.nan).astype(np.float32),
        "act_offset": np.array(starts, np.uint32),
        "act_at": np.array(offsets, np.int8),
        "act_value": np.array(values, np.uint8),
    }
