"""What the synthetic atlas is about: sizes, dictionaries, vocabulary with hostile texts, and
planted links."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
WORDS = (
    "river",
    "stone",
    "number",
    "seven",
    "Monday",
    "physics",
    "proof",
    "garden",
    "engine",
    "music",
    "winter",
    "law",
    "market",
    "cell",
    "matrix",
    "story",
    "colour",
    "north",
    "harbour",
    "treaty",
    "verb",
    "syntax",
    "planet",
    "protein",
    "chess",
    "export",
    "quarter",
    "bridge",
    "silver",
    "ocean",
    "thread",
    "archive",
    "lantern",
)


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
class World:
    sizes: Sizes
    rng: np.random.Generator
    sites: list[tuple[int, str]]
    vocabulary: list[bytes]
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))
    alive: dict[int, np.ndarray] = field(default_factory=dict)
    links: dict[int, list[tuple[int, np.ndarray, np.ndarray, np.ndarray, int]]] = field(
        default_factory=dict
    )
    first_card: bytes = b""

    def short(self, site: int) -> str:
        layer, kind = self.sites[site]
        return f"L{layer}" + {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}[kind]

    def index(self, layer: int, kind: str = "resid_post") -> int:
        return self.sites.index((layer, kind))


def make_world(sizes: Sizes) -> World:
    rng = np.random.default_rng(sizes.seed)
    sites: list[tuple[int, str]] = []
    for layer in range(sizes.n_layers):
        if layer % sizes.module_every == 1:
            sites += [(layer, "attn_out"), (layer, "mlp_out")]
        sites.append((layer, "resid_post"))
    words = [
        f" {w}{suffix}"
        for w in WORDS
        for suffix in ("", "s", "ed", "ing", "ly", " of", "'s", "-like")
    ]
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
    return World(sizes=sizes, rng=rng, sites=sites, vocabulary=vocabulary)


def make_links(world: World) -> dict[int, np.ndarray]:
    """Residual links along permutations (top-1 strong, top-2 and top-3 weak), modules into some
    latents.

    Returns, per residual site, the identity of each latent's chain, layer * 2^20 + latent of where
    it was born.
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
            world.links[site].append(
                (before, np.flatnonzero(carried), parent[carried], cosine[carried], 0)
            )
            for rank in (1, 2):
                other = rng.integers(0, n - 1, n)
                weak = np.clip(rng.normal(0.45 - 0.08 * rank, 0.08, n), 0.05, 0.8)
                world.links[site].append(
                    (before, np.flatnonzero(carried), other[carried], weak[carried], rank)
                )
            for module in ("mlp_out", "attn_out"):
                if (layer, module) in world.sites:
                    fed = np.flatnonzero(rng.random(n) < 0.3)
                    strength = np.clip(rng.normal(0.6, 0.12, len(fed)), 0.1, 0.99)
                    world.links[site].append(
                        (
                            world.index(layer, module),
                            fed,
                            rng.integers(0, n - 1, len(fed)),
                            strength,
                            0,
                        )
                    )
        chains[site] = identity
    return chains


def label_of(world: World, site: int, latent: int) -> str:
    if not world.alive[site][latent]:
        return ""
    if world.sizes.hostile and latent < len(HOSTILE_TEXTS):
        return f"active on {HOSTILE_TEXTS[latent]}"
    if latent % 3:
        return "no simple rule"
    return f"active on ‘{WORDS[latent % len(WORDS)]}’, ‘{WORDS[(latent // 7) % len(WORDS)]}’"
