"""A synthetic atlas, written from the published format (docs/decisions/0003-atlas-shards.md) and nothing else.

Seed and sizes -> a `site/` folder with planted structure, so that the pages can be tested without a model:

1. residual latents are carried along permutations with cosine about 0.9, a share of them is newborn at every layer;
2. modules feed some of them, one feature per dictionary is dead, one fires once;
3. tokens and labels include hostile text: script tags, line separators, broken UTF-8, right-to-left, a megabyte.

Cost: about two seconds for 30 x 2048. It does not import the package's writer: the two are checks on one another.
"""

# ruff: noqa: E501  (rows of tables stand on one line)

from __future__ import annotations

import base64
import gzip
import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DIST = Path(__file__).parents[2] / "pipeline" / "atlas" / "site" / "dist"
HOSTILE_TEXTS = (
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "<img src=x onerror=window.hacked=3>",
    "\"' onmouseover=window.hacked=4 x='",
    "javascript:window.hacked=5",
    "line\u2028separator\u2029paragraph",
    "\u202eright to left\u202c",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "nul\x00 bell\x07 esc\x1b",
    "{{7*7}} ${7*7} %s &lt;b&gt;",
    "a\tb\nc\r\n",
    "\ufeff\u200bzero width\u200d",
    "__proto__",
    "𝒳 👩‍👩‍👧 e\u0301\u0301\u0301\u0301",
)
_WORDS = (
    "river", "stone", "number", "seven", "Monday", "physics", "proof", "garden", "engine", "music", "winter", "law",
    "market", "cell", "matrix", "story", "colour", "north", "harbour", "treaty", "verb", "syntax", "planet",
    "protein", "chess", "export", "quarter", "bridge", "silver", "ocean", "thread", "archive", "lantern",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    n_layers: int = 30
    n_latents: int = 2048
    module_every: int = 4
    n_documents: int = 64
    n_context: int = 128
    rows_per_shard: int = 4096
    full_cards: bool = True
    huge_token: int = 1_000_000
    hostile: bool = True
    seed: int = 0


@dataclass(kw_only=True)
class _World:
    sizes: Sizes
    rng: np.random.Generator
    sites: list[tuple[int, str]]
    vocabulary: list[bytes]
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    alive: dict[int, np.ndarray] = field(default_factory=dict)
    links: dict[int, list[tuple[int, np.ndarray, np.ndarray, np.ndarray, int]]] = field(default_factory=dict)
    first_card: bytes = b""

    def short(self, site: int) -> str:
        layer, kind = self.sites[site]
        return f"L{layer}" + {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}[kind]

    def index(self, layer: int, kind: str = "resid_post") -> int:
        return self.sites.index((layer, kind))


def write_atlas(folder: Path, sizes: Sizes = Sizes(), *, app: Path = DIST) -> Path:  # frozen
    """Write a whole site; returns the path of its index.html."""
    shutil.copytree(app, folder, dirs_exist_ok=True)
    world = _make_world(sizes)
    _write_texts(folder, world)
    chains = _make_links(world)
    for site in range(len(world.sites)):
        _write_site(folder, world, site, chains)
    _write_flow(folder, world)
    _write_search(folder, world)
    _write_steering(folder, world)
    _shard(folder, "manifest", _manifest(world))
    return folder / "index.html"


def container(document: dict[str, Any], **columns: np.ndarray) -> bytes:
    """The FFC1 container of the format."""
    entries, parts, offset = [], [], 0
    for name, value in columns.items():
        array = np.ascontiguousarray(value)
        dtype = {"f": "f", "u": "u", "i": "i"}[array.dtype.kind] + str(8 * array.itemsize)
        entries.append({"name": name, "dtype": dtype, "shape": list(array.shape), "offset": offset})
        data = array.tobytes()
        padded = data + b"\0" * (-len(data) % 8)
        parts.append(padded)
        offset += len(padded)
    header = json.dumps({"json": document, "columns": entries}).encode()
    header += b" " * (-len(header) % 8)
    return b"FFC1" + len(header).to_bytes(4, "little") + header + b"".join(parts)


def _shard(folder: Path, key: str, document: dict[str, Any], **columns: np.ndarray) -> None:
    _write_payload(folder, key, container(document, **columns))


def _write_payload(folder: Path, key: str, payload: bytes) -> None:
    path = folder / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = base64.b64encode(gzip.compress(payload, 1)).decode()
    path.write_text(f'FF("{key}","{text}")\n')


def _make_world(sizes: Sizes) -> _World:
    rng = np.random.default_rng(sizes.seed)
    sites: list[tuple[int, str]] = []
    for layer in range(sizes.n_layers):
        if layer % sizes.module_every == 1:
            sites += [(layer, "attn_out"), (layer, "mlp_out")]
        sites.append((layer, "resid_post"))
    words = [f" {w}{suffix}" for w in _WORDS for suffix in ("", "s", "ed", "ing", "ly", " of", "'s", "-like")]
    vocabulary = [
        b"<|endoftext|>",
        b"\n",
        b".",
        b",",
        b"\xe2",
        b"\x80\x99",
        b"\xff\xfe",
        b"",
        *(w.encode() for w in words),
    ]
    if sizes.hostile:
        vocabulary += [text.encode("utf-8", "surrogatepass") for text in HOSTILE_TEXTS]
        vocabulary += [b"lone\xed\xa0\x80surrogate", b"x" * sizes.huge_token]
    return _World(sizes=sizes, rng=rng, sites=sites, vocabulary=vocabulary)


def _write_texts(folder: Path, world: _World) -> None:
    sizes, rng = world.sizes, world.rng
    lengths = np.array([len(token) for token in world.vocabulary])
    offset = np.concatenate([[0], lengths.cumsum()]).astype(np.uint32)
    data = np.frombuffer(b"".join(world.vocabulary), np.uint8)
    _shard(folder, "vocab", {"n_tokens": len(lengths), "special": [0]}, offset=offset, bytes=data)
    n_rows = sizes.n_documents * sizes.n_context
    tokens = rng.zipf(1.3, n_rows) % len(lengths)
    split = rng.integers(0, n_rows - 2, n_rows // 40)
    tokens[split], tokens[split + 1] = 4, 5  # one character made of two tokens
    world.tokens = tokens.astype(np.uint16)
    for shard in range(-(-n_rows // sizes.rows_per_shard)):
        part = world.tokens[shard * sizes.rows_per_shard : (shard + 1) * sizes.rows_per_shard]
        _shard(folder, f"corpus/{shard:03d}", {}, token=part)
    documents = np.arange(sizes.n_documents)
    titles = [
        HOSTILE_TEXTS[d % len(HOSTILE_TEXTS)] if d % 9 == 0 and sizes.hostile else f"Document {d}" for d in documents
    ]
    _shard(
        folder,
        "corpus/documents",
        {"titles": titles},
        run_row=(np.arange(sizes.n_documents + 1) * sizes.n_context).astype(np.uint32),
        run_document=documents.astype(np.uint32),
        run_position=np.zeros(sizes.n_documents, np.uint32),
        source=(documents % 3).astype(np.uint8),
        label=np.where(documents % 5 == 0, 255, documents % 2).astype(np.uint8),
    )


def _make_links(world: _World) -> dict[int, np.ndarray]:
    """Residual links along permutations (top-1 strong, top-2 and top-3 weak), modules into some latents.

    Returns, per residual site, the identity of each latent's chain: the latent where it was born, layer * 2^20 + latent.
    """
    rng, n = world.rng, world.sizes.n_latents
    chains: dict[int, np.ndarray] = {}
    for site, (layer, kind) in enumerate(world.sites):
        world.alive[site] = np.ones(n, bool)
        world.alive[site][n - 1] = False
        world.links[site] = []
        if kind != "resid_post":
            continue
        identity = layer * 2**20 + np.arange(n)
        if layer > 0:
            before = world.index(layer - 1)
            parent = (np.arange(n) * 5 + layer) % n if n % 5 else np.arange(n)[::-1].copy()
            carried = rng.random(n) < 0.82
            carried[n - 1] = False
            identity = np.where(carried, chains[before][parent], identity)
            cosine = np.clip(rng.normal(0.88, 0.08, n), 0.3, 0.999)
            world.links[site].append((before, np.flatnonzero(carried), parent[carried], cosine[carried], 0))
            for rank in (1, 2):
                other = rng.integers(0, n - 1, n)
                weak = np.clip(rng.normal(0.45 - 0.08 * rank, 0.08, n), 0.05, 0.8)
                world.links[site].append((before, np.flatnonzero(carried), other[carried], weak[carried], rank))
            for module in ("mlp_out", "attn_out"):
                if (layer, module) in world.sites:
                    fed = np.flatnonzero(rng.random(n) < 0.3)
                    strength = np.clip(rng.normal(0.6, 0.12, len(fed)), 0.1, 0.99)
                    world.links[site].append(
                        (world.index(layer, module), fed, rng.integers(0, n - 1, len(fed)), strength, 0)
                    )
        chains[site] = identity
    return chains


def _write_site(folder: Path, world: _World, site: int, chains: dict[int, np.ndarray]) -> None:
    name = f"sites/{world.short(site)}"
    density = _write_overview(folder, world, site, chains, name)
    _write_labels(folder, world, site, name)
    _write_links(folder, world, site, name)
    _write_cards(folder, world, site, name, density)


def _write_overview(folder: Path, world: _World, site: int, chains: dict[int, np.ndarray], name: str) -> np.ndarray:
    n, rng = world.sizes.n_latents, world.rng
    density = np.where(world.alive[site], 10.0 ** rng.uniform(-5, -1.2, n), 0).astype(np.float32)
    layer, _ = world.sites[site]
    fed = np.zeros(n, bool)
    carried = np.zeros(n, bool)
    for source, target, _, _, rank in world.links[site]:
        (carried if world.sites[source][1] == "resid_post" else fed)[target[np.full(len(target), rank == 0)]] = True
    kind = np.where(carried & fed, 2, np.where(carried, 1, np.where(fed | (layer == 0), 3, 4)))
    kind[~world.alive[site]] = 0
    identity = chains.get(site, layer * 2**20 + np.arange(n))
    flags = world.alive[site] * 1 + (np.arange(n) % 3 == 0) * 2 + (density > 0.1) * 8 + (rng.random(n) < 0.06) * 16
    n_in = sum((np.bincount(target, minlength=n) for _, target, *_ in world.links[site]), np.zeros(n, int))
    _shard(
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


def _label(world: _World, site: int, latent: int) -> str:
    if not world.alive[site][latent]:
        return ""
    if world.sizes.hostile and latent < len(HOSTILE_TEXTS):
        return f"fires on {HOSTILE_TEXTS[latent]}"
    if latent % 3:
        return "no simple rule"
    return f"fires on ‘{_WORDS[latent % len(_WORDS)]}’, ‘{_WORDS[(latent // 7) % len(_WORDS)]}’"


def _write_labels(folder: Path, world: _World, site: int, name: str) -> None:
    n = world.sizes.n_latents
    labels = [_label(world, site, latent) for latent in range(n)]
    ruled = np.array([label not in ("", "no simple rule") for label in labels])
    method = np.where(ruled, np.arange(n) % 3, 255).astype(np.uint8)
    score = np.where(ruled, 150 + np.arange(n) % 100, 255).astype(np.uint8)
    _shard(folder, f"{name}/labels", {"labels": labels}, method=method, score=score)


def _write_links(folder: Path, world: _World, site: int, name: str) -> None:
    n, rng = world.sizes.n_latents, world.rng
    parts = world.links[site]
    target = np.concatenate([t for _, t, *_ in parts] or [np.zeros(0, int)])
    source_site = np.concatenate([np.full(len(t), s) for s, t, *_ in parts] or [np.zeros(0, int)])
    source = np.concatenate([s for _, _, s, _, _ in parts] or [np.zeros(0, int)])
    cosine = np.concatenate([c for *_, c, _ in parts] or [np.zeros(0)])
    rank = np.concatenate([np.full(len(t), r) for _, t, _, _, r in parts] or [np.zeros(0, int)])
    order = np.lexsort((rank, target))
    target, source_site, source, cosine, rank = (x[order] for x in (target, source_site, source, cosine, rank))
    kinds = [world.sites[s][1] for s in source_site]
    relation = np.array([{"resid_post": 0, "mlp_out": 1, "attn_out": 2}[kind] for kind in kinds], np.uint8)
    tested = rng.random(len(target)) < 0.1
    e = len(target)
    _shard(
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


def _write_cards(folder: Path, world: _World, site: int, name: str, density: np.ndarray) -> None:
    n = world.sizes.n_latents
    for first in range(0, n, 256):
        if first and not world.sizes.full_cards:
            raw = world.first_card  # the same columns again; only for timings
            payload = raw.replace(b'"first": 0,', b'"first": %d,' % first, 1)
            width = 8 + int.from_bytes(raw[4:8], "little")
            payload = _repad(payload, width - len(raw) + len(payload))
            _write_payload(folder, f"{name}/cards/{first // 256:03d}", payload)
            continue
        latents = np.arange(first, min(first + 256, n))
        labels = [_card_labels(world, site, int(latent)) for latent in latents]
        document = {"first": first, "n": len(latents), "labels": labels}
        payload = container(document, **_card_columns(world, site, latents, density[latents]))
        world.first_card = payload if first == 0 else world.first_card
        _write_payload(folder, f"{name}/cards/{first // 256:03d}", payload)


def _repad(payload: bytes, end: int) -> bytes:
    header = payload[8:end].rstrip(b" ")
    header += b" " * (-len(header) % 8)
    return payload[:4] + len(header).to_bytes(4, "little") + header + payload[end:]


def _card_labels(world: _World, site: int, latent: int) -> list[dict[str, Any]]:
    text = _label(world, site, latent)
    base = {"score": 0.81, "low": 0.74, "high": 0.87, "n": 210, "precision": 0.9, "recall": 0.75, "near_miss": 0.8}
    inherited = {"text": "days of the week", "method": 2, "from": "L0/3", "cosine": 0.93, "accepted": True, **base}
    if text in ("", "no simple rule"):
        return (
            []
            if not text
            else [{"text": text, "method": 0, "score": None, "n": 0, "accepted": False, "from": None}, inherited]
        )
    return [{"text": text, "method": latent % 3, "accepted": True, "from": None, **base}, inherited]


def _card_columns(world: _World, site: int, latents: np.ndarray, density: np.ndarray) -> dict[str, np.ndarray]:
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
        "decile": np.where(alive[:, None], np.linspace(0.05, 1, 11)[None] * top[:, None], np.nan).astype(np.float32),
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


def _examples(world: _World, n: int, alive: np.ndarray, top: np.ndarray) -> dict[str, np.ndarray]:
    rng = world.rng
    plan = [(0, 255)] * 8 + [(1, d) for d in range(9, -1, -1)] + [(2, 255)] * 4 + [(3, 255)] * 2
    e = len(plan)
    per = np.where(alive, e, 0)
    rows = rng.integers(0, len(world.tokens), (n, e))[alive].ravel()
    tab = np.tile([t for t, _ in plan], int(alive.sum())).astype(np.uint8)
    decile = np.tile([9 if t == 0 else (5 if t == 2 else d) for t, d in plan], int(alive.sum())).astype(np.uint8)
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


def _write_flow(folder: Path, world: _World) -> None:
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
    _shard(folder, "flow/model", {"pairs": pairs, "settings": {"alpha": 0.01}})
    sites = range(len(world.sites))
    communities = []
    for c in range(40):
        tokens = [8 + c, 9 + c, len(world.vocabulary) - 1 - c % 16]
        label = HOSTILE_TEXTS[c] if world.sizes.hostile and c < 3 else _WORDS[c % len(_WORDS)]
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
    _shard(folder, "flow/communities", {"communities": communities, "ribbons": ribbons, "other": other})
    _shard(folder, "flow/trunks", {"trunks": [_trunk(world, k) for k in range(2000)]})


def _pair(source: int, target: int, relation: str, n: int, world: _World, median: float) -> dict[str, Any]:
    return {
        "source": source, "target": target, "relation": relation, "n_links": n, "n_possible": world.sizes.n_latents - 1,
        "median_cosine": median, "mutual": 0.8, "threshold": 0.41, "null_median": 0.2, "null_p99": 0.35,
        "agreement": 0.7, "initialisation": "same start", "adjacent": True,
    }  # fmt: skip


def _trunk(world: _World, k: int) -> dict[str, Any]:
    rng, n = np.random.default_rng(k), world.sizes.n_latents
    length = max(2, int(world.sizes.n_layers * (1 - k / 2200)))
    first = int(rng.integers(0, world.sizes.n_layers - length + 1))
    cosine = np.clip(rng.normal(0.9, 0.06, length - 1), 0.3, 1)
    label = (
        HOSTILE_TEXTS[k] if world.sizes.hostile and k < len(HOSTILE_TEXTS) else f"fires on {_WORDS[k % len(_WORDS)]}"
    )
    return {
        "features": [f"L{layer}/{int(rng.integers(0, n - 1))}" for layer in range(first, first + length)],
        "cosine": [round(float(c), 4) for c in cosine],
        "density": [round(float(10 ** rng.uniform(-4, -2)), 6) for _ in range(length)],
        "label": label, "score": float(rng.random()), "product": float(cosine.prod()),
    }  # fmt: skip


def _write_search(folder: Path, world: _World) -> None:
    v, rng = len(world.vocabulary), world.rng
    per = np.full(1024, 0)
    per[:v] = 6
    e = int(per.sum())
    weight = np.tile(np.linspace(250, 40, 6), v).astype(np.uint8)
    _shard(
        folder,
        "search/tokens/000",
        {},
        offset=np.concatenate([[0], per.cumsum()]).astype(np.uint32),
        site=rng.integers(0, len(world.sites), e).astype(np.uint16),
        latent=rng.integers(0, world.sizes.n_latents - 1, e).astype(np.uint16),
        kind=(np.arange(e) % 2).astype(np.uint8),
        weight=weight,
    )


def _write_steering(folder: Path, world: _World) -> None:
    layer = world.sizes.n_layers // 2
    feature = f"L{layer}/30"
    samples = [
        {"feature": feature, "label": "fires on harbour", "arm": arm, "dose": dose, "schedule": "constant",
         "features": [f"L{layer - 1}/3", feature], "seed": seed, "prompt": "The weather was",
         "unsteered": " cold and the road was empty.", "steered": HOSTILE_TEXTS[seed] + " near the harbour, harbour harbour.",
         "measure": {"name": "own tokens per 100", "unsteered": 1.2, "steered": 9.0}}
        for arm in ("single layer", "flow additive") for dose in (0.1, 0.4) for seed in range(3)
    ]  # fmt: skip
    effects = [
        {"feature": feature, "arm": arm, "dose": dose, "name": "own tokens per 100", "mean": 8 * dose + k, "low": 6 * dose, "high": 10 * dose + 2, "n": 64}
        for k, arm in enumerate(("single layer", "flow additive")) for dose in (0.1, 0.2, 0.4)
    ]  # fmt: skip
    commands = {feature: f"featureflow steer --features {feature}"}
    _shard(folder, "attached/steering", {"version": 1, "samples": samples, "effects": effects, "commands": commands})


def _manifest(world: _World) -> dict[str, Any]:
    sizes = world.sizes
    n = sizes.n_latents
    sites = [
        {"site": f"blocks.{layer}.hook_{kind}", "short": world.short(i), "layer": layer, "kind": kind, "n_latents": n,
         "n_alive": n - 1, "n_labelled": n // 3, "n_cards": -(-n // 256), "n_dying": n // 16,
         "classes": {"translated": int(n * 0.6), "processed": int(n * 0.2), "newborn": int(n * 0.15), "unexplained": n // 20},
         "metrics": {"fvu": 0.21, "l0": 32.0, "dead": 1}}
        for i, (layer, kind) in enumerate(world.sites)
    ]  # fmt: skip
    return {
        "format": "featureflow-atlas", "version": 1, "title": f"Synthetic · {len(sites)} dictionaries", "profile": "standard",
        "model": {"name": "synthetic-model", "fingerprint": "0" * 16, "n_layers": sizes.n_layers, "d_model": 64, "d_vocab": len(world.vocabulary), "n_context": sizes.n_context},
        "corpus": {
            "n_tokens": len(world.tokens), "n_tokens_seen": len(world.tokens) - 64, "n_documents": sizes.n_documents,
            "rows_per_shard": sizes.rows_per_shard, "n_shards": -(-len(world.tokens) // sizes.rows_per_shard),
            "sources": [{"name": name, "n_tokens": 1000, "n_documents": 20} for name in ("wiki", "code", "<b>books</b>")],
            "labels": [{"name": "physics", "n_tokens": 1000}, {"name": "music", "n_tokens": 1000}],
            "filters": {"drop_bos": True, "drop_special": True, "drop_sinks": True}, "n_dropped": {"bos": 64, "sink": 3}, "holdout": 0.333,
        },
        "sites": sites, "cards_per_shard": 256, "window": 24, "example_tabs": ["top", "decile", "uniform", "near_miss"],
        "histogram": {"log2_low": -16, "bins_per_octave": 2, "n_bins": 64},
        "position_edges": [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128],
        "position_totals": [500] * 15, "source_totals": [1000] * 3, "label_totals": [1000] * 2,
        "label_methods": [
            {"name": "token", "kind": "rule", "about": "fires on these tokens"},
            {"name": "previous token", "kind": "rule", "about": "fires after these tokens"},
            {"name": "inherited", "kind": "flow", "about": "label of the linked feature"},
        ],
        "classes": ["unknown", "translated", "processed", "newborn", "unexplained"],
        "relations": ["residual", "mlp", "attention"],
        "search": {"tokens_per_shard": 1024, "shards": [0]},
        "has": {"flow": True, "communities": True, "trunks": True},
        "headline": {"n_features": n * len(sites), "n_alive": (n - 1) * len(sites), "n_labelled": n // 3 * len(sites), "n_links": 210000, "fvu_median": 0.2134},
        "provenance": {"collect": "c" * 64, "train": "t" * 64, "link": "l" * 64, "evaluate": None, "made_by": {"versions": {"torch": "2.13"}}},
        "licences": ["Synthetic text, no rights reserved"],
    }  # fmt: skip
