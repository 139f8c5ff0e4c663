"""Is this folder an atlas that the app can read? Every problem, with its place.

1. the manifest is one of this version, and `manifest.json` lists every shard with size and sha256
2. every shard is one call with base64 (nothing else in the file), and unpacks
3. every column has the dtype, shape and range that docs/decisions/0003-atlas-shards.md gives it:
   offsets grow and end at the number of entries, ids lie inside their dictionary or vocabulary,
   rows inside the corpus
4. no file but the app's own and the shards lies in the folder

Cost: reads every byte once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featureflow.errors import Command, Problem, UserError
from pipeline.describe.columns import PAD
from pipeline.site.shards import Shard, read_shard
from pipeline.site.site_folder import FORMAT, VERSION

APP_FILES = ("index.html", "app.js", "app.css", "README.txt", "manifest.json")
_PER_LATENT = {
    "overview": (
        "density",
        "max",
        "class",
        "birth",
        "death",
        "community",
        "n_in",
        "n_out",
        "flags",
    ),
    "labels": ("method", "score"),
}
_TOKEN_LISTS = ("token", "previous", "promotes", "suppresses")


def validate_atlas(folder: Path | str) -> dict[str, int]:
    """Check a `site/` folder (or the artifact around it); returns counts. Raises UserError with
    every problem."""
    site = Path(folder)
    site = site / "site" if (site / "site" / "manifest.js").is_file() else site
    manifest = read_shard(site, "manifest").json
    problems = list(_manifest_problems(site, manifest))
    if not problems:
        listing = json.loads((site / "manifest.json").read_text(encoding="utf-8"))["shards"]
        problems = [*_listing_problems(site, listing), *_shard_problems(site, manifest)]
    if problems:
        raise UserError(
            f"{site} is not a whole atlas",
            problems=tuple(problems),
            fix=Command("atlas", force=True),
        )
    n_features = sum(int(s["n_latents"]) for s in manifest["sites"])
    return {
        "n_sites": len(manifest["sites"]),
        "n_features": n_features,
        "n_shards": len(listing) + 1,
    }


def _manifest_problems(site: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, VERSION):
        yield Problem(
            what="another format or version",
            where="manifest",
            expected=f"{FORMAT} {VERSION}",
            found=str(found),
        )
        return
    needed = (
        "model",
        "corpus",
        "sites",
        "cards_per_shard",
        "window",
        "example_tabs",
        "histogram",
        "position_edges",
        "label_methods",
        "classes",
        "relations",
        "search",
        "has",
        "headline",
        "provenance",
    )
    for name in needed:
        if name not in manifest:
            yield Problem(what="missing key", where=f"manifest: {name}")
    if not (site / "manifest.json").is_file():
        yield Problem(what="file missing", where="manifest.json")


def _listing_problems(site: Path, listing: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """The list of shards against the files, both ways."""
    for key, entry in listing.items():
        path = site / f"{key}.js"
        if not path.is_file():
            yield Problem(what="shard missing", where=f"{key}.js")
        elif (found := hashlib.sha256(path.read_bytes()).hexdigest()) != entry["sha256"]:
            yield Problem(
                what="checksum differs", where=f"{key}.js", expected=entry["sha256"], found=found
            )
    known = {f"{key}.js" for key in listing} | {*APP_FILES}
    for path in sorted(p for p in site.rglob("*") if p.is_file()):
        if path.relative_to(site).as_posix() not in known:
            yield Problem(
                what="a file that does not belong here", where=path.relative_to(site).as_posix()
            )


def _shard_problems(site: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    n_rows = int(manifest["corpus"]["n_tokens"])
    n_tokens = 0
    for key, check in _checks(manifest):
        try:
            shard = read_shard(site, key)
            if key == "vocab":
                n_tokens = int(shard.json["n_tokens"])
            yield from (Problem(what=text, where=key) for text in check(shard, n_tokens, n_rows))
        except UserError as error:
            yield from error.problems
        except (KeyError, IndexError, ValueError, TypeError) as error:
            yield Problem(
                what="not as the format says", where=key, found=f"{type(error).__name__}: {error}"
            )


def _checks(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key that must exist, with what checks it; `vocab` first, since others need its size."""
    yield (
        "vocab",
        lambda shard, _v, _r: _csr(shard, "offset", int(shard.json["n_tokens"]), ("bytes",)),
    )
    for i in range(int(manifest["corpus"]["n_shards"])):
        yield f"corpus/{i:03d}", lambda shard, v, _: _below(shard, "token", v)
    yield (
        "corpus/documents",
        lambda shard, _v, rows: (
            []
            if int(shard.columns["run_row"][-1]) == rows
            else ["run_row does not end at the last row"]
        ),
    )
    for entry in manifest["sites"]:
        base, n = f"sites/{entry['short']}", int(entry["n_latents"])
        for name, columns in _PER_LATENT.items():
            yield f"{base}/{name}", lambda shard, _v, _r, c=columns, n=n: _lengths(shard, c, n)
        if manifest["has"]["flow"]:
            yield (
                f"{base}/flow",
                lambda shard, _v, _r, n=n: _csr(
                    shard, "target_offset", n, ("source", "cosine", "rank")
                ),
            )
        for card in range(int(entry["n_cards"])):
            yield (
                f"{base}/cards/{card:03d}",
                lambda shard, v, rows, n=n: _card_problems(shard, v, rows, n),
            )
    if manifest["has"]["flow"]:
        yield "flow/model", lambda shard, _v, _r: [] if shard.json else ["empty"]
        yield (
            "flow/communities",
            lambda shard, _v, _r: _lengths(
                shard, ("id", "token", "n_by_site"), len(shard.json["labels"])
            ),
        )
        yield (
            "flow/trunks",
            lambda shard, _v, _r: _trunk_problems(
                shard, [int(s["n_latents"]) for s in manifest["sites"]]
            ),
        )
    size = int(manifest["search"]["tokens_per_shard"])
    for i in manifest["search"]["shards"]:
        yield (
            f"search/tokens/{i:03d}",
            lambda shard, _v, _r: _csr(shard, "offset", size, ("site", "latent", "kind", "weight")),
        )
    for lens in manifest.get("lenses", []):
        yield f"lenses/{lens['name']}", lambda shard, _v, _r: _lens_problems(shard)
    for trace in manifest.get("traces", []):
        yield f"traces/{trace['name']}", lambda shard, _v, _r: _trace_problems(shard)
    for entry in manifest["sites"]:
        if entry.get("lenses"):
            n = int(entry["n_latents"])
            yield (
                f"sites/{entry['short']}/lenses",
                lambda shard, _v, _r, n=n: _lens_column_problems(shard, n),
            )
    yield (
        "attached/steering",
        lambda shard, _v, _r: [] if "samples" in shard.json else ["samples missing"],
    )
    yield (
        "attached/scores",
        lambda shard, _v, _r: [] if "features" in shard.json else ["features missing"],
    )


def _card_problems(shard: Shard, n_tokens: int, n_rows: int, n_latents: int) -> list[str]:
    n, c = int(shard.json["n"]), shard.columns
    problems = _lengths(
        shard, ("count", "mean", "max", "decile", "histogram", "token", "promotes", "similar"), n
    )
    if len(shard.json["labels"]) != n:
        problems.append("labels: not one list a latent")
    problems += _csr(shard, "example_offset", n, ("example_tab", "example_row", "example_value"))
    problems += _csr(shard, "act_offset", len(c["example_row"]), ("act_at", "act_value"))
    problems += _below(shard, "example_row", n_rows)
    for name in _TOKEN_LISTS:
        problems += _below(shard, name, n_tokens)
    for name in ("similar", "cofiring"):
        problems += _below(shard, name, n_latents)
    if not (c["histogram"].sum(axis=1) == c["count"]).all():
        problems.append("histogram does not add up to count")
    return problems


def _trunk_problems(shard: Shard, n_latents: list[int]) -> list[str]:
    """Trunks that share no feature, of features that exist, each with its label."""
    columns, n = shard.columns, len(shard.json["labels"])
    problems = _lengths(shard, ("length", "begin", "end", "community", "score"), n)
    problems += _lengths(
        shard, ("site", "latent", "cosine", "count"), int(columns["length"].astype(np.int64).sum())
    )
    if problems:
        return problems
    site, latent = columns["site"].astype(np.int64), columns["latent"].astype(np.int64)
    if (site >= len(n_latents)).any() or (latent >= np.asarray(n_latents)[site]).any():
        return ["a feature lies outside its dictionary"]
    return (
        [] if len(np.unique(site << 32 | latent)) == len(site) else ["a feature is on two trunks"]
    )


def _lens_problems(shard: Shard) -> list[str]:
    """A page has texts, and tables whose rows are as wide as their head."""
    texts = [
        f"{name}: not a text"
        for name in ("title", "text", "figure")
        if not isinstance(shard.json[name], str)
    ]
    return texts + [
        f"table {table['name']}: a row of {len(row)} cells, not {len(table['columns'])}"
        for table in shard.json["tables"]
        for row in table["rows"]
        if len(row) != len(table["columns"])
    ]


def _trace_problems(shard: Shard) -> list[str]:
    """Supernodes lie on tokens of the prompt, and edges lead between them."""
    document = shard.json
    n_tokens, ids = len(document["pieces"]), {node["id"] for node in document["supernodes"]}
    outside = [n["id"] for n in document["supernodes"] if not 0 <= n["token"] < n_tokens]
    loose = [e for e in document["edges"] if not {e["source"], e["target"]} <= ids]
    problems = [f"supernode {i} lies on no token" for i in outside]
    return problems + ([f"{len(loose)} edges lead to no supernode"] if loose else [])


def _lens_column_problems(shard: Shard, n: int) -> list[str]:
    """One entry a latent."""
    columns = shard.json["columns"]
    lengths = [
        len(column["texts"] if "texts" in column else shard.columns[str(i)])
        for i, column in enumerate(columns)
    ]
    return [
        f"{column['lens']} {column['name']}: {length} entries instead of {n}"
        for column, length in zip(columns, lengths, strict=True)
        if length != n
    ]


def _lengths(shard: Shard, names: tuple[str, ...], n: int) -> list[str]:
    return [
        f"{name}: {len(shard.columns[name])} entries instead of {n}"
        for name in names
        if len(shard.columns[name]) != n
    ]


def _csr(shard: Shard, offset: str, n: int, entries: tuple[str, ...]) -> list[str]:
    edges = shard.columns[offset].astype(np.int64)
    if len(edges) != n + 1 or edges[0] != 0 or (np.diff(edges) < 0).any():
        return [f"{offset}: not {n + 1} growing offsets from 0"]
    return [
        f"{name}: {len(shard.columns[name])} entries, {offset} ends at {edges[-1]}"
        for name in entries
        if len(shard.columns[name]) != edges[-1]
    ]


def _below(shard: Shard, name: str, limit: int) -> list[str]:
    values = shard.columns[name].astype(np.int64)
    beyond = (values >= limit) & (values != PAD)
    return [f"{name}: {int(values[beyond].max())} is not below {limit}"] if beyond.any() else []
