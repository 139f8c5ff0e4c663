"""The flow graph → files that other programs open: GraphML, GEXF, Cytoscape JSON, attribution-graph
JSON.

1. Choose features: all that have kept links, or the flow around one feature.
2. Make a networkx graph with plain attributes (no nulls: a number that is not known is left out).
3. Write beside and rename.

The attribution-graph form is the one that the viewers of circuit-tracer and Neuronpedia read. A
flow graph has no prompt, so the token axis shows where in a layer a feature lives: residual stream,
MLP, attention, and before or inside the layer where there are dictionaries. There are at least
three such tokens, since the viewer hides what is active on more than two thirds of them. `feature`
is the Cantor pairing of the layer and a number that no other feature of the layer has: the latent
for the residual stream, for other sites the latent beyond those of the sites before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from featureflow.errors import UserError
from featureflow.files import written_atomically
from featureflow.sites import IN_LAYER, FeatureId
from pipeline.flow.attribution import cantor, graph_json, graph_node
from pipeline.flow.graph import FlowGraph

PLACES = (
    "residual stream",
    "MLP",
    "attention",
    "residual stream before the layer",
    "residual stream inside the layer",
    "attention heads",
    "MLP input before the gain",
    "MLP input",
)
_KINDS = ("resid_post", "mlp_out", "attn_out", "resid_pre", "resid_mid")
_PLACE_OF_KIND = {kind: i for i, kind in enumerate(dict.fromkeys((*_KINDS, *IN_LAYER)))}
_N_USUAL = 3
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
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
    "gradient_effect",
)


def export_graph(
    graph: FlowGraph,
    path: str | Path,
    *,
    around: FeatureId | str | None = None,
    max_hops: int | None = None,
    max_nodes: int | None = None,
    labels: Mapping[str, str] | None = None,
    form: str = "",
) -> Path:
    """Write to `path` in the `form` .graphml, .gexf, .cyjs, or .json for the attribution graph; by
    default its ending says which.

    `around`, `max_hops` and `max_nodes` restrict to the flow through one feature, nearest and
    strongest first; `labels` maps feature ids to text.
    """
    target = Path(path)
    write = _WRITERS.get(form or target.suffix)
    if write is None:
        raise UserError(
            "no such export",
            where=str(target),
            expected=" | ".join(_WRITERS),
            found=form or target.suffix or "no ending",
        )
    made = to_networkx(graph, around=around, max_hops=max_hops, max_nodes=max_nodes, labels=labels)
    if not len(made):
        raise UserError("nothing to export: no kept links here", where=str(around or target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(target) as beside:
        write(made, beside)
    return target


def to_networkx(
    graph: FlowGraph,
    *,
    around: FeatureId | str | None = None,
    max_hops: int | None = None,
    max_nodes: int | None = None,
    labels: Mapping[str, str] | None = None,
) -> nx.DiGraph:
    """Kept links as a directed graph over feature ids; the attribute `weight` is the cosine."""
    rows, made = graph.links, nx.DiGraph(around=str(around or ""))
    if around is None:
        numbers = np.union1d(rows["source"], rows["target"])
    else:
        numbers = np.sort(_flow_through(graph, around, max_hops)[:max_nodes])
        rows = graph.links_between(numbers)
    names = {int(number): str(graph.feature(int(number))) for number in numbers}
    for name, facts in zip(
        names.values(), _known(graph.nodes.iloc[numbers], _NODE_COLUMNS), strict=True
    ):
        made.add_node(name, label=(labels or {}).get(name, name), **facts)
    ends = zip(rows["source"].map(names), rows["target"].map(names), strict=True)
    for (source, target), facts in zip(ends, _known(rows, _EDGE_COLUMNS), strict=True):
        made.add_edge(source, target, weight=facts["cosine"], **facts)
    return made


def attribution_document(
    made: nx.DiGraph, *, slug: str = "flow-graph", scan: str = "featureflow"
) -> dict[str, Any]:
    """The attribution-graph JSON of a networkx flow graph."""
    facts = dict(made.nodes(data=True))
    names = {feature: _attribution_id(node) for feature, node in facts.items()}
    last = max((_PLACE_OF_KIND[node["kind"]] for node in facts.values()), default=0)
    places = PLACES[: max(last + 1, _N_USUAL)]
    most = max((int(node["latent"]) + 1 for node in facts.values()), default=0)
    around = made.graph.get("around", "")
    nodes = [
        graph_node(
            names[id],
            layer=node["layer"],
            # `most` is above every latent: the number differs between the sites of a layer
            feature=cantor(node["layer"], node["latent"] + _PLACE_OF_KIND[node["kind"]] * most),
            token=_PLACE_OF_KIND[node["kind"]],
            n_tokens=len(places),
            clerp=id if node["label"] in (id, "") else f"{id} {node['label']}",
        )
        for id, node in facts.items()
    ]
    return graph_json(
        slug=slug,
        scan=scan,
        tokens=places,
        prompt=" ".join(places),
        description=f"features that flow into and out of {around}"
        if around
        else "Flow graph of sparse-autoencoder features",
        nodes=nodes,
        links=[(names[a], names[b], link["weight"]) for a, b, link in made.edges(data=True)],
        pinned=[names[around]] if around else [],
        clicked=names.get(around, ""),
    )


def _attribution_id(facts: Mapping[str, Any]) -> str:
    return f"{facts['layer']}_{facts['latent']}_{_PLACE_OF_KIND[facts['kind']]}"


def _flow_through(graph: FlowGraph, feature: FeatureId | str, max_hops: int | None) -> list[int]:
    """The feature, then what it reaches and is reached from, nearest and strongest first."""
    reached = [
        *graph.ancestors(feature, max_hops=max_hops),
        *graph.descendants(feature, max_hops=max_hops),
    ]
    near = sorted(reached, key=lambda found: (found.hops, -found.strength))
    return [graph.number(feature), *(graph.number(found.feature) for found in near)]


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
    nx.write_graphml_xml(_for_xml(made), path)


def _write_gexf(made: nx.DiGraph, path: Path) -> None:
    nx.write_gexf(_for_xml(made), path)


def _for_xml(made: nx.DiGraph) -> nx.DiGraph:
    """The same graph without the characters in labels that XML cannot hold."""
    made = nx.DiGraph(made)
    made.graph.clear()
    for _, facts in made.nodes(data=True):
        facts["label"] = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", facts["label"])
    return made


def _write_cytoscape(made: nx.DiGraph, path: Path) -> None:
    path.write_text(json.dumps(nx.cytoscape_data(made), ensure_ascii=False), encoding="utf-8")


def _write_attribution(made: nx.DiGraph, path: Path) -> None:
    slug = path.name.split(".")[0]
    text = json.dumps(attribution_document(made, slug=slug), ensure_ascii=False)
    path.write_text(text, encoding="utf-8", errors="replace")


_WRITERS: dict[str, Callable[[nx.DiGraph, Path], None]] = {
    ".graphml": _write_graphml,
    ".gexf": _write_gexf,
    ".cyjs": _write_cytoscape,
    ".json": _write_attribution,
}
