"""What the pages of all sites share: vocabulary, corpus, model-wide flow, token search, manifest,
and the app's own files.

1. `vocab`, `corpus/…`: tokens as bytes, once; rows of the store; runs and documents
2. `flow/model`, `flow/communities`, `flow/trunks`: the graph from afar
3. `search/tokens/…`: which features are active on, or promote, a token
4. `attached/steering`, `attached/scores`: what the steer stage and `featureflow atlas explain`
   found
5. the app (`pipeline/site/app/dist`), and the manifest with size and sha256 of every shard
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.describe.columns import PAD, PAGE_BINS, Columns
from pipeline.describe.corpus import Corpus
from pipeline.describe.examples import TABS
from pipeline.describe.labels import METHODS
from pipeline.describe.survey import LOG2_LOW, REACH
from pipeline.flow.graph import RELATIONS, FlowGraph
from pipeline.site.flow_pages import FEWEST_LAYERS, community_shard, pairs_json, trunk_shard
from pipeline.site.pages import CARDS_PER_SHARD, CLASSES
from pipeline.site.shards import Shard, narrow, write_shard

FORMAT, VERSION = "featureflow-atlas", 2
ATTACHED_VERSION = 1
ROWS_PER_SHARD, TOKENS_PER_SHARD = 262_144, 1024
_SEARCH_SHARE, _SEARCH_TOKENS, _SEARCH_PROMOTES = 0.05, 5, 5
_README = """This folder is an atlas of features. Open index.html by double click;
nothing is loaded from the network. It also works from any static web host.
The tables of the describe stage hold the same data for programs.
"""


def write_vocabulary(site: Path, corpus: Corpus) -> None:
    tokens = corpus.vocabulary.tokens
    offset = np.concatenate([[0], np.cumsum([len(t) for t in tokens])]).astype(np.uint32)
    write_shard(
        site,
        "vocab",
        Shard(
            json={
                "n_tokens": len(tokens),
                "special": sorted(corpus.vocabulary.special),
                "parts": {str(token): character for token, character in corpus.characters.items()},
            },
            columns={"offset": offset, "bytes": np.frombuffer(b"".join(tokens), dtype=np.uint8)},
        ),
    )


def write_corpus(site: Path, corpus: Corpus) -> int:
    """Token shards and the documents; returns the number of token shards."""
    starts = range(0, len(corpus), ROWS_PER_SHARD)
    for i, start in enumerate(starts):
        token = narrow(corpus.token[start : start + ROWS_PER_SHARD], len(corpus.vocabulary))
        write_shard(site, f"corpus/{i:03d}", Shard(columns={"token": token}))
    runs = corpus.run_start
    columns = {
        "run_row": np.concatenate([runs, [len(corpus)]]).astype(np.uint32),
        "run_document": corpus.document[runs].astype(np.uint32),
        "run_position": corpus.position[runs].astype(np.uint32),
        "source": corpus.document_source.astype(np.uint8),
        "label": np.where(corpus.document_label < 0, 255, corpus.document_label).astype(np.uint8),
    }
    names = {"titles": list(corpus.titles)}
    names |= {"images": list(corpus.images)} if corpus.images else {}
    write_shard(site, "corpus/documents", Shard(json=names, columns=columns))
    return len(starts)


def write_flow(
    site: Path, graph: FlowGraph, features: pd.DataFrame, columns: Sequence[Columns], corpus: Corpus
) -> int:
    """The graph from afar; `features` has a row a feature. Returns the number of trunks of three
    layers or more."""
    write_shard(site, "flow/model", Shard(json={"pairs": pairs_json(graph), "settings": {}}))
    write_shard(site, "flow/communities", community_shard(graph, columns, corpus))
    trunks = trunk_shard(graph, features)
    write_shard(site, "flow/trunks", trunks)
    return int((trunks.columns["length"] >= FEWEST_LAYERS).sum())


def write_search(site: Path, corpus: Corpus, columns: Sequence[Columns]) -> list[int]:
    """Shards of features by token; returns the numbers of those that exist."""
    parts = [_search_entries(i, c) for i, c in enumerate(columns)]
    token, where, latent, kind, weight = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = np.lexsort((latent, where, -weight.astype(int), token))
    token, where, latent, kind, weight = (a[order] for a in (token, where, latent, kind, weight))
    largest = max(len(c["count"]) for c in columns)
    shards = np.unique(token // TOKENS_PER_SHARD)
    for shard in shards:
        first = int(shard) * TOKENS_PER_SHARD
        edges = np.searchsorted(token, np.arange(first, first + TOKENS_PER_SHARD + 1))
        here = slice(edges[0], edges[-1])
        entries = {
            "offset": (edges - edges[0]).astype(np.uint32),
            "site": where[here].astype(np.uint16),
            "latent": narrow(latent[here], largest),
            "kind": kind[here],
            "weight": weight[here],
        }
        write_shard(site, f"search/tokens/{int(shard):03d}", Shard(columns=entries))
    return [int(s) for s in shards]


def write_attached(
    site: Path, steering: Mapping[str, Any] | None, opinions: Mapping[str, Any]
) -> None:
    """What later stages found about single features; empty when they did not run."""
    nothing: dict[str, Any] = {"samples": [], "effects": [], "commands": {}}
    version = {"version": ATTACHED_VERSION}
    write_shard(site, "attached/steering", Shard(json=version | nothing | dict(steering or {})))
    write_shard(site, "attached/scores", Shard(json=version | {"features": dict(opinions)}))


def copy_app(site: Path) -> bool:
    """Copy the built app beside the data. Returns whether there was one (a source checkout may not
    have built it)."""
    (site / "README.txt").write_text(_README, encoding="utf-8")
    folder = resources.files("pipeline.site") / "app" / "dist"
    names = ("index.html", "app.js", "app.css")
    if not all((folder / name).is_file() for name in names):
        return False
    for name in names:
        with resources.as_file(folder / name) as path:
            shutil.copyfile(path, site / name)
    return True


def write_manifest(site: Path, document: Mapping[str, Any]) -> None:
    """`manifest.js` for the app and `manifest.json` with the shards' sizes and checksums for
    `validate`."""
    write_shard(site, "manifest", Shard(json=document))
    shards = {}
    for path in sorted(site.rglob("*.js")):
        key = path.relative_to(site).as_posix().removesuffix(".js")
        if key != "app":
            content = path.read_bytes()
            shards[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps({**document, "shards": shards}, ensure_ascii=False, indent=1)
    (site / "manifest.json").write_text(text, encoding="utf-8", errors="replace")


def manifest_of_corpus(
    corpus: Corpus, *, n_shards: int, holdout: float, filters: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest's part about the text and the scales that columns refer to."""
    n_source = np.bincount(
        corpus.document_source[corpus.document[corpus.kept]], minlength=len(corpus.sources)
    )
    documents = np.bincount(
        corpus.document_source[np.unique(corpus.document)], minlength=len(corpus.sources)
    )
    label = corpus.attribute("topic")[corpus.kept]
    n_label = np.bincount(label[label >= 0], minlength=len(corpus.labels))[: len(corpus.labels)]
    positions = np.bincount(corpus.position_bin[corpus.kept], minlength=len(corpus.position_edges))
    return {
        "corpus": {
            "n_tokens": len(corpus),
            "n_tokens_seen": corpus.n_kept,
            "n_documents": len(np.unique(corpus.document)),
            "rows_per_shard": ROWS_PER_SHARD,
            "n_shards": n_shards,
            "sources": [
                {"name": n, "n_tokens": int(t), "n_documents": int(d)}
                for n, t, d in zip(corpus.sources, n_source, documents, strict=True)
            ],
            "labels": [
                {"name": n, "n_tokens": int(t)} for n, t in zip(corpus.labels, n_label, strict=True)
            ],
            "filters": dict(filters),
            "n_dropped": {"all": len(corpus) - corpus.n_kept},
            "holdout": holdout,
        },
        "position_edges": list(corpus.position_edges),
        "position_totals": positions.tolist(),
        "source_totals": n_source.tolist(),
        "label_totals": n_label.tolist(),
    }


def fixed_manifest() -> dict[str, Any]:
    """The part of the manifest that is the same in every atlas of this version."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "cards_per_shard": CARDS_PER_SHARD,
        "window": REACH,
        "example_tabs": list(TABS),
        "histogram": {
            "log2_low": LOG2_LOW,
            "bins_per_octave": PAGE_BINS // 32,
            "n_bins": PAGE_BINS,
        },
        "label_methods": [{"name": m.name, "kind": m.kind, "about": m.about} for m in METHODS],
        "classes": list(CLASSES),
        "relations": list(RELATIONS),
    }


def _search_entries(index: int, c: Columns) -> tuple[np.ndarray, ...]:
    """token, site, latent, kind, weight of one site's entries."""
    shown = (c["token"] != PAD) & (c["token_share"] >= _SEARCH_SHARE)
    shown[:, _SEARCH_TOKENS:] = False
    latent, place = np.nonzero(shown)
    promotes = c["promotes"][:, :_SEARCH_PROMOTES]
    up, up_place = np.nonzero((promotes != PAD) & (c["count"] > 0)[:, None])
    token = np.concatenate([c["token"][latent, place], promotes[up, up_place]]).astype(np.int64)
    kind = np.repeat(np.array([0, 1], dtype=np.uint8), [len(latent), len(up)])
    share = c["token_share"][latent, place] * 255
    weight = np.concatenate([np.rint(share), np.rint(255 * (1 - up_place / 10))]).astype(np.uint8)
    return token, np.full(len(token), index), np.concatenate([latent, up]), kind, weight
