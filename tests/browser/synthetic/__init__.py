"""A synthetic atlas, written from the published format (docs/decisions/0003-atlas-shards.md) and
nothing else.

Seed and sizes -> a `site/` folder with planted structure, so that the pages can be tested without a
model:

1. residual latents are carried along permutations with cosine about 0.9, a share of them is newborn
   at every layer;
2. modules feed some of them, one feature per dictionary is dead, one is active once;
3. tokens and labels include hostile text: script tags, line separators, broken UTF-8,
   right-to-left, a megabyte.

Cost: about two seconds for 30 x 2048. It does not import the package's writer: the two are checks
on one another.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.browser.synthetic.flow import write_flow
from tests.browser.synthetic.model_wide import (
    manifest,
    write_lenses,
    write_scores,
    write_search,
    write_steering,
)
from tests.browser.synthetic.shards import container, write_shard
from tests.browser.synthetic.sites import write_site
from tests.browser.synthetic.texts import write_texts
from tests.browser.synthetic.traces import write_traces
from tests.browser.synthetic.world import HOSTILE_TEXTS, Sizes, World, make_links, make_world

__all__ = [
    "HOSTILE_TEXTS",
    "Sizes",
    "World",
    "container",
    "make_links",
    "make_world",
    "write_atlas",
    "write_shard",
    "write_texts",
]

DIST = Path(__file__).parents[3] / "pipeline" / "site" / "app" / "dist"


def write_atlas(folder: Path, sizes: Sizes, *, app: Path = DIST) -> Path:
    """Write a whole site; returns the path of its index.html."""
    shutil.copytree(app, folder, dirs_exist_ok=True)
    world = make_world(sizes)
    write_texts(folder, world)
    chains = make_links(world)
    for site in range(len(world.sites)):
        write_site(folder, world, site, chains)
    write_flow(folder, world)
    write_search(folder, world)
    write_steering(folder, world)
    write_scores(folder, world)
    write_lenses(folder, world)
    write_traces(folder, world)
    write_shard(folder, "manifest", manifest(world))
    return folder / "index.html"
