"""Attribution-graph JSON: the form that the viewers of circuit-tracer and Neuronpedia read.

`metadata`, `qParams` (what is pinned and grouped), `nodes`, `links`. The viewers know features of
transcoders, reconstruction errors, embeddings and logits, and no features of the residual stream:
ours go out as `cross layer transcoder`, and the description says so. Ids of errors are
`err_{layer}_{token}`: circuit-tracer's `0_{layer}_{token}` is also the id of feature number `layer`
of layer 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FEATURE, ERROR, LOGIT = "cross layer transcoder", "mlp reconstruction error", "logit"
LONGEST_CLERP = 512


def cantor(x: int, y: int) -> int:
    """The pairing function that attribution graphs number features with."""
    return (x + y) * (x + y + 1) // 2 + y


def graph_node(
    name: str,
    *,
    layer: int | str,
    feature: int,
    token: int,
    n_tokens: int,
    clerp: str,
    **facts: Any,
) -> dict[str, Any]:
    """A node; `facts` are the fields that differ from those of a plain feature."""
    usual = {
        "feature_type": FEATURE,
        "influence": None,
        "activation": None,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
    }
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": feature,
        "layer": str(layer),
        "ctx_idx": token,
        "reverse_ctx_idx": n_tokens - 1 - token,
        "clerp": clerp[:LONGEST_CLERP],
        **usual,
        **facts,
    }


def graph_json(
    *,
    slug: str,
    scan: str,
    tokens: Sequence[str],
    prompt: str,
    description: str,
    nodes: Iterable[Mapping[str, Any]],
    links: Iterable[tuple[str, str, float]],
    pinned: Sequence[str] = (),
    supernodes: Sequence[Sequence[str]] = (),
    clicked: str = "",
) -> dict[str, Any]:
    """The whole document; a supernode is its name, then the ids of its nodes."""
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "prompt": prompt,
            "prompt_tokens": list(tokens),
            "transcoder_list": [],
            "node_threshold": 1.0,
            "schema_version": 1,
            "info": {
                "description": description,
                "creator_name": "featureflow",
                "generator": {"name": "featureflow", "version": "1"},
            },
        },
        "qParams": {
            "pinnedIds": list(pinned),
            "supernodes": [list(each) for each in supernodes],
            "linkType": "both",
            "clickedId": clicked,
            "sg_pos": "",
        },
        "nodes": list(nodes),
        "links": [
            {"source": a, "target": b, "weight": round(float(weight), 5)} for a, b, weight in links
        ],
    }
