"""The flow graph as the atlas shows it: links by target, the fate of every feature, pairs.

Read from the link artifact's `nodes.parquet`, `edges.parquet`, `pairs.parquet` (docs/formats.md,
"Flow graph"); only kept links are shown. A site of the atlas that the graph does not know simply
has no links.

1. links are grouped by target site and sorted by target and rank;
2. the parent of a feature is its best kept predecessor along the residual stream; labels are
   inherited from it;
3. what is shown of the whole graph is made from it: trunks (trunks.py) and communities
   (communities.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float32, Int64

from featureflow.errors import Command, Problem, UserError
from featureflow.sites import Site, parse_site
from pipeline.site.shards import Shard, narrow

CLASSES = ("unknown", "translated", "processed", "newborn", "unexplained")
RELATIONS = ("residual", "mlp", "attention")
_NODE_COLUMNS = ("site", "latent", "class", "birth_layer", "death_layer", "community")
_EDGE_COLUMNS = (
    *("source_site", "source_latent", "target_site", "target_latent"),
    *("relation", "rank", "cosine", "q_value", "mutual", "kept"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Links:
    """Kept links as columns; sites are indices into the atlas' sites. Sorted by target site,
    target, rank."""

    source_site: Int64[np.ndarray, "link"]
    source: Int64[np.ndarray, "link"]
    target_site: Int64[np.ndarray, "link"]
    target: Int64[np.ndarray, "link"]
    relation: Int64[np.ndarray, "link"]
    rank: Int64[np.ndarray, "link"]
    evidence: pd.DataFrame

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, kw_only=True, eq=False)
class AtlasGraph:
    """Sites in the atlas' order, latents per site, kept links, and a node table with `site_index`
    and `number`."""

    sites: tuple[Site, ...]
    n_latents: tuple[int, ...]
    links: Links
    nodes: pd.DataFrame
    pairs: pd.DataFrame

    @cached_property
    def start(self) -> Int64[np.ndarray, "site_and_one"]:
        """Features are numbered through all sites: feature (s, f) is `start[s] + f`."""
        return np.concatenate([[0], np.cumsum(self.n_latents)])

    @cached_property
    def parent(self) -> tuple[Int64[np.ndarray, "feature"], Float32[np.ndarray, "feature"]]:
        """The best kept predecessor along the residual stream of every feature (number, −1 none),
        and the cosine."""
        links = self.links
        best = np.flatnonzero((links.relation == 0) & (links.rank == 0))
        parent = np.full(self.start[-1], -1, dtype=np.int64)
        cosine = np.zeros(self.start[-1], dtype=np.float32)
        child = self.start[links.target_site[best]] + links.target[best]
        parent[child] = self.start[links.source_site[best]] + links.source[best]
        cosine[child] = links.evidence["cosine"].to_numpy(np.float32)[best]
        return parent, cosine

    @cached_property
    def degree(self) -> tuple[Int64[np.ndarray, "feature"], Int64[np.ndarray, "feature"]]:
        """Kept links into and out of every feature."""
        links = self.links
        n = int(self.start[-1])
        into = np.bincount(self.start[links.target_site] + links.target, minlength=n)
        return into, np.bincount(self.start[links.source_site] + links.source, minlength=n)

    def site_of(self, number: Int64[np.ndarray, "*feature"]) -> Int64[np.ndarray, "*feature"]:
        return np.searchsorted(self.start, number, side="right") - 1

    def feature(self, number: int) -> str:
        """The id of a feature by its number: `L12/402`."""
        site = int(np.searchsorted(self.start, number, side="right")) - 1
        return f"{self.sites[site].short}/{number - int(self.start[site])}"

    def column(self, name: str, missing: int) -> Int64[np.ndarray, "feature"]:
        """A whole-number column of the nodes for all features of the atlas."""
        out = np.full(self.start[-1], missing, dtype=np.int64)
        values = pd.to_numeric(self.nodes[name]).fillna(missing)
        out[self.nodes["number"]] = values.to_numpy(np.int64)
        return out

    @cached_property
    def node_class(self) -> Int64[np.ndarray, "feature"]:
        """Index into CLASSES."""
        out = np.zeros(self.start[-1], dtype=np.int64)
        names = {name: i for i, name in enumerate(CLASSES)}
        out[self.nodes["number"]] = (
            self.nodes["class"].astype(object).map(names).fillna(0).to_numpy(np.int64)
        )
        return out

    @cached_property
    def dying(self) -> np.ndarray:
        """No link onward along the residual stream, though the graph has a later residual site."""
        links = self.links
        onward = np.zeros(self.start[-1], dtype=bool)
        onward[(self.start[links.source_site] + links.source)[links.relation == 0]] = True
        linked = set(self.nodes["site_index"])
        residual = [
            i for i, site in enumerate(self.sites) if site.kind == "resid_post" and i in linked
        ]
        out = np.zeros(self.start[-1], dtype=bool)
        for site in residual[:-1]:
            out[self.start[site] : self.start[site + 1]] = ~onward[
                self.start[site] : self.start[site + 1]
            ]
        return out


def read_graph(folder: Path, sites: Sequence[Site], n_latents: Sequence[int]) -> AtlasGraph:
    """Read the link artifact's tables. Raises UserError when a column is missing or a latent lies
    outside its dictionary."""
    index = {site.short: i for i, site in enumerate(sites)}
    nodes = _read(folder / "nodes.parquet", _NODE_COLUMNS)
    edges = _read(folder / "edges.parquet", _EDGE_COLUMNS)
    pairs = _read(folder / "pairs.parquet", ("source_site", "target_site", "relation", "n_links"))
    start = np.concatenate([[0], np.cumsum(n_latents)])
    nodes = nodes.assign(site_index=_site_index(nodes["site"], index)).query("site_index >= 0")
    _check_latents(folder, nodes["site_index"], nodes["latent"], n_latents)
    nodes = nodes.assign(number=start[nodes["site_index"]] + nodes["latent"]).reset_index(drop=True)
    pairs = pairs.assign(
        source=_site_index(pairs["source_site"], index),
        target=_site_index(pairs["target_site"], index),
    )
    return AtlasGraph(
        sites=tuple(sites),
        n_latents=tuple(n_latents),
        links=_links(edges, index),
        nodes=nodes,
        pairs=pairs.query("source >= 0 and target >= 0").reset_index(drop=True),
    )


def flow_shard(graph: AtlasGraph, site: int) -> Shard:
    """The links that end at one site."""
    links, n = graph.links, graph.n_latents[site]
    here = slice(*np.searchsorted(links.target_site, [site, site + 1]))
    evidence = links.evidence.iloc[here]
    columns = {
        "target_offset": np.searchsorted(links.target[here], np.arange(n + 1)).astype(np.uint32),
        "source_site": links.source_site[here].astype(np.uint16),
        "source": narrow(links.source[here], max(graph.n_latents)),
        "relation": links.relation[here].astype(np.uint8),
        "rank": np.minimum(links.rank[here], 255).astype(np.uint8),
        "cosine": _scaled(evidence, "cosine", np.int16, -32768),
        "q": _log_q(evidence),
        "pearson": _scaled(evidence, "pearson", np.int16, -32768),
        "jaccard": _scaled(evidence, "jaccard", np.uint16, 65535),
        "margin": _scaled(evidence, "margin", np.int16, -32768),
        "mutual": evidence["mutual"].to_numpy(np.uint8),
        "causal_success": _share(evidence, "causal_success"),
        "causal_change": _floats(evidence, "causal_change").astype(np.float32),
        "causal_n": np.nan_to_num(_floats(evidence, "causal_n")).clip(0, 65535).astype(np.uint16),
    }
    return Shard(columns=columns)


def overview_columns(graph: AtlasGraph | None, site: int, n_latents: int) -> dict[str, np.ndarray]:
    """The graph's part of a site's overview; unknown everywhere without a graph."""
    if graph is None:
        unknown = np.full(n_latents, -1, np.int16)
        zero = np.zeros(n_latents, np.uint16)
        return {
            "class": np.zeros(n_latents, np.uint8),
            "birth": unknown,
            "death": unknown.copy(),
            "community": np.full(n_latents, 65535, np.uint16),
            "n_in": zero,
            "n_out": zero.copy(),
        }
    here = slice(graph.start[site], graph.start[site + 1])
    community = graph.column("community", -1)[here]
    return {
        "class": graph.node_class[here].astype(np.uint8),
        "birth": graph.column("birth_layer", -1)[here].astype(np.int16),
        "death": graph.column("death_layer", -1)[here].astype(np.int16),
        "community": np.where((community < 0) | (community >= 65535), 65535, community).astype(
            np.uint16
        ),
        "n_in": np.minimum(graph.degree[0][here], 65535).astype(np.uint16),
        "n_out": np.minimum(graph.degree[1][here], 65535).astype(np.uint16),
    }


def pairs_json(graph: AtlasGraph) -> list[dict[str, Any]]:
    """The pairs of dictionaries with their links and null, for `flow/model`."""
    return [_pair_json(row) for row in graph.pairs.to_dict(orient="records")]


def _links(edges: pd.DataFrame, index: Mapping[str, int]) -> Links:
    edges = edges[edges["kept"].to_numpy(bool)]
    source_site, target_site = (
        _site_index(edges["source_site"], index),
        _site_index(edges["target_site"], index),
    )
    known = (source_site >= 0) & (target_site >= 0)
    edges, source_site, target_site = edges[known], source_site[known], target_site[known]
    relation = (
        edges["relation"]
        .astype(str)
        .astype(object)
        .map({name: i for i, name in enumerate(RELATIONS)})
        .fillna(0)
        .to_numpy(np.int64)
    )
    order = np.lexsort((edges["rank"], relation, edges["target_latent"], target_site))
    edges = edges.iloc[order].reset_index(drop=True)
    return Links(
        source_site=source_site[order],
        source=edges["source_latent"].to_numpy(np.int64),
        target_site=target_site[order],
        target=edges["target_latent"].to_numpy(np.int64),
        relation=relation[order],
        rank=edges["rank"].to_numpy(np.int64),
        evidence=edges,
    )


def _site_index(names: pd.Series, index: Mapping[str, int]) -> Int64[np.ndarray, "row"]:
    """Short or long site names to indices; −1 for a site the atlas does not have."""
    codes = pd.Categorical(names.astype(str))
    known = np.array(
        [index.get(parse_site(name).short, -1) for name in codes.categories], dtype=np.int64
    )
    return known[codes.codes] if len(known) else np.zeros(len(names), dtype=np.int64)


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            "the flow graph cannot be read",
            where=str(path),
            found=str(error),
            fix=Command("run", to="link"),
        ) from error
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        problems = tuple(
            Problem(what="column missing", where=f"{path}: {name}") for name in missing
        )
        raise UserError(
            "not a flow graph's table", problems=problems, fix=Command("run", to="link")
        )
    return frame


def _check_latents(
    folder: Path, site: pd.Series, latent: pd.Series, n_latents: Sequence[int]
) -> None:
    limit = np.asarray(n_latents)[site.to_numpy()]
    if len(latent) and ((latent.to_numpy() >= limit) | (latent.to_numpy() < 0)).any():
        raise UserError(
            "the flow graph was made from other dictionaries",
            where=str(folder / "nodes.parquet"),
            expected=f"latents below {int(limit.max())}",
            found=str(int(latent.max())),
            fix=Command("run", to="link"),
        )


def _pair_json(row: Mapping[Any, Any]) -> dict[str, Any]:
    def number(name: str) -> float | None:
        value = row.get(name)
        return None if value is None or pd.isna(value) else round(float(value), 4)

    n_links = int(row["n_links"])
    n_mutual = number("n_mutual")
    return {
        "source": int(row["source"]),
        "target": int(row["target"]),
        "relation": str(row["relation"]),
        "n_links": n_links,
        "n_possible": None if number("n_targets") is None else int(row["n_targets"]),
        "median_cosine": number("cosine_median"),
        "mutual": None
        if n_mutual is None or not n_links
        else round(min(1.0, n_mutual / n_links), 4),
        "threshold": number("threshold"),
        "null_median": number("null_median"),
        "null_p99": number("null_p99"),
        "agreement": number("agreement"),
        "pearson_median": number("pearson_median_kept") or number("pearson_median"),
        "initialisation": str(row.get("start", "")),
        "null": str(row.get("null", "")),
        "adjacent": bool(number("gap") in (None, 0.0, 1.0)),
    }


def _floats(frame: pd.DataFrame, name: str) -> np.ndarray:
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[name]).to_numpy(np.float64, na_value=np.nan)


def _scaled(frame: pd.DataFrame, name: str, dtype: type, missing: int) -> np.ndarray:
    values = np.rint(_floats(frame, name) * 10000)
    return np.where(np.isfinite(values), np.nan_to_num(values), missing).astype(dtype)


def _share(frame: pd.DataFrame, name: str) -> np.ndarray:
    values = np.rint(_floats(frame, name) * 200)
    return np.where(np.isfinite(values), np.nan_to_num(values), 255).astype(np.uint8)


def _log_q(frame: pd.DataFrame) -> np.ndarray:
    q = _floats(frame, "q_value")
    with np.errstate(divide="ignore"):
        scaled = np.rint(-10 * np.log10(q))
    return np.where(np.isnan(q), 255, np.clip(np.nan_to_num(scaled, posinf=254), 0, 254)).astype(
        np.uint8
    )
