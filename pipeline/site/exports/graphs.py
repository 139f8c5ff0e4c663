"""The links of an atlas as graph files.

`export_attribution_graph`: the neighbourhood of one feature in the JSON that circuit-tracer's and
Neuronpedia's graph viewers read: one position, `feature` by Cantor pairing of layer and latent,
`clerp` the label, `weight` the cosine. `export_gexf` (Gephi), `export_graphml` (yEd, igraph,
networkx): all linked features with label, layer and density.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureflow.sites import parse_feature
from pipeline.describe.opened import Atlas

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd


def export_attribution_graph(
    atlas: Atlas, feature: str, out: Path, *, hops: int = 4, max_nodes: int = 300
) -> Path:
    """Write the features within `hops` links of `feature` and the links between them."""
    edges = atlas.edges
    nodes = neighbourhood(edges, feature, hops=hops, max_nodes=max_nodes)
    inside = edges[edges["source"].isin(nodes) & edges["target"].isin(nodes)]
    layers = max(site.layer for site in atlas.sites) + 1
    document = {
        "metadata": {
            "slug": f"flow-{feature.replace('/', '-').replace('.', '-')}",
            "scan": "featureflow",
            "schema_version": 1,
            "prompt": "flow",
            "prompt_tokens": ["flow"],
            "transcoder_list": [],
            "node_threshold": 1.0,
            "info": {
                "description": f"features that flow into and out of {feature}",
                "creator_name": "featureflow",
                "generator": {"name": "featureflow", "version": "1"},
            },
        },
        "qParams": {
            "pinnedIds": [_node_id(feature)],
            "supernodes": [],
            "linkType": "both",
            "clickedId": _node_id(feature),
            "sg_pos": "",
        },
        "nodes": [_node(atlas, node, layers) for node in nodes],
        "links": [
            {
                "source": _node_id(e.source),
                "target": _node_id(e.target),
                "weight": round(float(e.cosine), 5),
            }
            for e in inside.itertuples()
        ],
    }
    out.write_text(
        json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8", errors="replace"
    )
    return out


def export_gexf(atlas: Atlas, out: Path) -> Path:
    import networkx as nx

    nx.write_gexf(as_networkx(atlas), out)
    return out


def export_graphml(atlas: Atlas, out: Path) -> Path:
    import networkx as nx

    nx.write_graphml(as_networkx(atlas), out)
    return out


def as_networkx(atlas: Atlas) -> nx.DiGraph:
    """All features that have links, and the links."""
    import networkx as nx

    edges = atlas.edges
    graph = nx.DiGraph()
    features = atlas.features.set_index("feature")
    for name in dict.fromkeys([*edges["source"], *edges["target"]]):
        row = features.loc[name]
        graph.add_node(
            name,
            label=xml_text(str(row["label"])),
            layer=int(row["layer"]),
            density=float(row["density"]),
        )
    for e in edges.itertuples():
        graph.add_edge(
            e.source,
            e.target,
            weight=float(e.cosine),
            relation=str(e.relation),
            q_value=float(e.q_value),
            mutual=bool(e.mutual),
        )
    return graph


def neighbourhood(edges: pd.DataFrame, feature: str, *, hops: int, max_nodes: int) -> list[str]:
    """The feature and what lies within `hops` links of it, strongest links first, at most
    `max_nodes`."""
    nodes = dict.fromkeys([feature])
    frontier = {feature}
    for _ in range(hops):
        touching = edges[edges["source"].isin(frontier) | edges["target"].isin(frontier)]
        ends = touching.sort_values("cosine", ascending=False)
        found = dict.fromkeys(
            x for pair in zip(ends["source"], ends["target"], strict=True) for x in pair
        )
        frontier = set([x for x in found if x not in nodes][: max(0, max_nodes - len(nodes))])
        nodes |= {x: None for x in found if x in frontier}
    return list(nodes)


def cantor(x: int, y: int) -> int:
    """The pairing function that current attribution graphs number features with."""
    return (x + y) * (x + y + 1) // 2 + y


def xml_text(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(
        c if c in "\t\n" or (c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF) else "�"
        for c in text
    )


def _node_id(feature: str) -> str:
    """`{layer}_{latent}_{position}` as these viewers expect; a module's features are told apart by
    its short name."""
    parsed = parse_feature(feature)
    place = str(parsed.site.layer) if parsed.site.kind == "resid_post" else parsed.site.short
    return f"{place}_{parsed.latent}_0"


def _node(atlas: Atlas, feature: str, n_layers: int) -> dict[str, Any]:
    parsed = parse_feature(feature)
    row = atlas.features.iloc[atlas.number(feature)]
    return {
        "node_id": _node_id(feature),
        "jsNodeId": _node_id(feature),
        "feature": cantor(parsed.site.layer, parsed.latent),
        "layer": str(parsed.site.layer),
        "ctx_idx": 0,
        "feature_type": "cross layer transcoder",
        "clerp": f"{feature} {row['label']}"[:512],
        "activation": float(row["max"]),
        "influence": None,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }
