"""The flow graph → files that other programs open: GraphML, GEXF, Cytoscape JSON, attribution-graph
JSON.

1. Choose features: all that have kept links, or the flow around one feature.
2. Make a networkx graph with plain attributes (no nulls: a number that is not known is left out).
3. Write beside and rename.

The attribution-graph form is the one circuit-tracer's viewer reads. A flow graph has no prompt, so
the viewer's token axis shows where in a layer a feature lives: residual stream, MLP, attention, and
before or inside the layer where there are dictionaries. `feature` is the Cantor pairing of layer
and latent, as that viewer expects now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from featureflow.errors import UserError
from featureflow.sites import FeatureId
from pipeline.flow.graph import FlowGraph

PLACES = (
    "residual stream",
    "MLP",
    "attention",
    "residual stream before the layer",
    "residual stream inside the layer",
)
_PLACE_OF_KIND = {"resid_post": 0, "mlp_out": 1, "attn_out": 2, "resid_pre": 3, "resid_mid": 4}
_N_USUAL = 3
_NODE_COLUMNS = (
    "layer",
    "kind",
    "latent",
    "density",
    "class",
    "birth_layer",
    "death_layer",
    "persistence",
    "community",
)
_EDGE_COLUMNS = (
    "relation",
    "rank",
    "cosine",
    "margin",
    "q_value",
    "mutual",
    "pearson",
    "jaccard",
    "causal_success",
)


def export_graph(
    graph: FlowGraph,
    path: str | Path,
    *,
    around: FeatureId | str | None = None,
    max_hops: int | None = None,
    labels: Mapping[str, str] | None = None,
) -> Path:
    """Write to `path`; its ending chooses the form: .graphml, .gexf, .cyjs, or .json for the
    attribution graph.

    `around` and `max_hops` restrict to the flow through one feature; `labels` maps feature ids to
    text.
    """
    target = Path(path)
    if target.suffix not in _WRITERS:
        raise UserError(
            "no such export",
            where=str(target),
            expected=" | ".join(_WRITERS),
            found=target.suffix or "no ending",
        )
    made = to_networkx(graph, around=around, max_hops=max_hops, labels=labels)
    if not len(made):
        raise UserError("nothing to export: no kept links here", where=str(around or target))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    _WRITERS[target.suffix](made, beside)
    beside.replace(target)
    return target


def to_networkx(
    graph: FlowGraph,
    *,
    around: FeatureId | str | None = None,
    max_hops: int | None = None,
    labels: Mapping[str, str] | None = None,
) -> nx.DiGraph:
    """Kept links as a directed graph over feature ids; the attribute `weight` is the cosine."""
    wanted = None if around is None else _flow_through(graph, around, max_hops)
    rows = graph.kept_between(wanted)
    made = nx.DiGraph()
    numbers = (
        np.union1d(rows["source"], rows["target"]) if wanted is None else np.array(sorted(wanted))
    )
    names = {int(number): str(graph.feature(int(number))) for number in numbers}
    for name, facts in zip(
        names.values(), _known(graph.nodes.iloc[numbers], _NODE_COLUMNS), strict=True
    ):
        made.add_node(name, label=(labels or {}).get(name, name), **facts)
    ends = zip(rows["source"].map(names), rows["target"].map(names), strict=True)
    for (source, target), facts in zip(
        ends, _known(graph.edges.iloc[rows["edge"]], _EDGE_COLUMNS), strict=True
    ):
        made.add_edge(source, target, weight=facts["cosine"], **facts)
    return made


def attribution_document(
    made: nx.DiGraph, *, slug: str = "flow-graph", scan: str = "featureflow"
) -> dict[str, Any]:
    """The attribution-graph JSON of a networkx flow graph."""
    names = {feature: _attribution_id(facts) for feature, facts in made.nodes(data=True)}
    last = max((_PLACE_OF_KIND[facts["kind"]] for _, facts in made.nodes(data=True)), default=0)
    places = PLACES[: max(last + 1, _N_USUAL)]
    nodes = [
        _attribution_node(names[feature], facts, len(places))
        for feature, facts in made.nodes(data=True)
    ]
    links = [
        {"source": names[a], "target": names[b], "weight": facts["weight"]}
        for a, b, facts in made.edges(data=True)
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "prompt": " ".join(places),
        "prompt_tokens": list(places),
        "transcoder_list": [],
        "node_threshold": 1.0,
        "schema_version": 1,
        "info": {
            "description": "Flow graph of sparse-autoencoder features",
            "generator": {"name": "featureflow"},
        },
    }
    parameters = {
        "pinnedIds": [],
        "supernodes": [],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    return {"metadata": metadata, "qParams": parameters, "nodes": nodes, "links": links}


def _attribution_id(facts: Mapping[str, Any]) -> str:
    return f"{facts['layer']}_{facts['latent']}_{_PLACE_OF_KIND[facts['kind']]}"


def _attribution_node(name: str, facts: Mapping[str, Any], n_places: int) -> dict[str, Any]:
    place = _PLACE_OF_KIND[facts["kind"]]
    layer, latent = int(facts["layer"]), int(facts["latent"])
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": (layer + latent) * (layer + latent + 1) // 2 + latent,
        "layer": str(layer),
        "ctx_idx": place,
        "reverse_ctx_idx": n_places - 1 - place,
        "feature_type": "cross layer transcoder",
        "clerp": facts["label"],
        "influence": None,
        "activation": None,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
    }


def _flow_through(graph: FlowGraph, feature: FeatureId | str, max_hops: int | None) -> set[int]:
    reached = [
        *graph.ancestors(feature, max_hops=max_hops),
        *graph.descendants(feature, max_hops=max_hops),
    ]
    return {graph.number(feature), *(graph.number(found.feature) for found in reached)}


def _known(table: pd.DataFrame, columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """For each row the plain Python values of the columns that are known."""
    chosen = table[[name for name in columns if name in table.columns]].astype(object)
    for record in chosen.to_dict(orient="records"):
        facts = {str(name): value for name, value in record.items() if not pd.isna(value)}
        yield {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in facts.items()
        }


def _write_graphml(made: nx.DiGraph, path: Path) -> None:
    nx.write_graphml_xml(made, path)


def _write_gexf(made: nx.DiGraph, path: Path) -> None:
    nx.write_gexf(made, path)


def _write_cytoscape(made: nx.DiGraph, path: Path) -> None:
    path.write_text(json.dumps(nx.cytoscape_data(made), ensure_ascii=False), encoding="utf-8")


def _write_attribution(made: nx.DiGraph, path: Path) -> None:
    slug = path.name.split(".")[0]
    path.write_text(
        json.dumps(attribution_document(made, slug=slug), ensure_ascii=False), encoding="utf-8"
    )


_WRITERS: dict[str, Callable[[nx.DiGraph, Path], None]] = {
    ".graphml": _write_graphml,
    ".gexf": _write_gexf,
    ".cyjs": _write_cytoscape,
    ".json": _write_attribution,
}
