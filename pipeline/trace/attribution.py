"""A trace as attribution-graph JSON, and such files of other tools as traces to look at.

Out: nodes are the members of the supernodes, the larger reconstruction errors, answer and foil.
`influence` is the share of the effect that a node and all stronger ones hold. Links between the
supernodes' strongest members have the real effect of a removal as weight, links to the answer the
change of y; errors have their score. What was measured stands in the key `featureflow`, which
viewers ignore.

In: nodes, supernodes, names and weights are shown; nothing can be removed, and y is not known. A
graph without supernodes shows its strongest nodes one by one. circuit-tracer's `.pt` is refused: it
is a pickle, and opening one runs code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featureflow.errors import Problem, UserError
from featureflow.sites import IN_LAYER, FeatureId, parse_feature, parse_site
from pipeline.flow.attribution import ERROR, LOGIT, cantor, graph_json, graph_node
from pipeline.trace.document import VERSION, Document

_SMALLEST_ERROR, _MOST_FOREIGN, _LARGEST_BYTES = 0.02, 60, 200 << 20
_SITE = 1_000_000
_NODE_KEYS = {"node_id": str, "layer": (str, int), "ctx_idx": int, "feature_type": str}
_LINK_KEYS = {"source": str, "target": str, "weight": (int, float)}


def attribution_of(document: Document, *, slug: str, scan: str = "featureflow") -> dict[str, Any]:
    """The attribution graph of one of our traces."""
    n = len(document["pieces"])
    nodes = [*_members(document, n), *_errors(document, n), *_logits(document, n)]
    answer = nodes[-1]["node_id"] if "answer" in document["target"] else ""
    best = {each["id"]: _id(_strongest(each), each["token"]) for each in document["supernodes"]}
    links = [
        (best[edge["source"]], best[edge["target"]], edge["removed"])
        for edge in document["edges"]
        if edge["drawn"]
    ]
    if answer:
        links += [(best[each["id"]], answer, each["removed"]) for each in document["supernodes"]]
        links += [(e["node_id"], answer, e["activation"]) for e in _errors(document, n)]
    shown = document["supernodes"][: document["options"]["n_shown"]]
    made = graph_json(
        slug=slug,
        scan=scan,
        tokens=document["pieces"],
        prompt=document["prompt"],
        description="Features of the residual stream at chosen layers, with the real effect of "
        "removing each supernode; written as transcoder features, since viewers know no others.",
        nodes=nodes,
        links=links,
        pinned=[i for each in shown for i in _ids(each)] + ([answer] if answer else []),
        supernodes=[[each["name"], *_ids(each)] for each in shown],
    )
    measured = ("id", "name", "predicted", "removed", "control", "kl", "differs", "breaks", "top")
    made["featureflow"] = {
        "y": document["y"],
        "target": document["target"],
        "supernodes": [{k: each[k] for k in measured} for each in document["supernodes"]],
        "checks": document["checks"],
    }
    return made


def read_attribution(path: Path) -> Document:
    """The graph in a file as a document. Raises UserError with every problem."""
    if path.suffix == ".pt":
        raise UserError(
            "a .pt file is a pickle, which runs code when it is opened",
            where=str(path),
            expected="attribution-graph JSON",
            fix="write it with circuit-tracer's create_graph_files",
        )
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UserError("this file is too large for a page", where=str(path))
        graph = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("this is no JSON", where=str(path), found=str(error)) from error
    if problems := list(_problems(graph)):
        raise UserError(
            "this is no attribution graph", where=str(path), problems=tuple(problems[:50])
        )
    return _document(graph)


def _members(document: Document, n_tokens: int) -> Iterator[dict[str, Any]]:
    weights = {
        _id(member["feature"], each["token"]): abs(each["removed"])
        * abs(member["score"])
        / max(sum(abs(m["score"]) for m in each["members"]), 1e-12)
        for each in document["supernodes"]
        for member in each["members"]
    }
    share, total, below = {}, max(sum(weights.values()), 1e-12), 0.0
    for name in sorted(weights, key=lambda each: -weights[each]):
        below += weights[name]
        share[name] = round(below / total, 6)
    for each in document["supernodes"]:
        for member in each["members"]:
            feature, name = parse_feature(member["feature"]), _id(member["feature"], each["token"])
            layer = feature.site.layer
            yield graph_node(
                name,
                layer=layer,
                feature=cantor(layer, _number(feature)),
                token=each["token"],
                n_tokens=n_tokens,
                clerp=f"{member['feature']} {each['name']}",
                influence=share[name],
                activation=member["z"],
            )


def _errors(document: Document, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Those that carry at least a share of y; `activation` is their score."""
    for rest in document["rest"]:
        layer = parse_site(rest["cut"]).layer
        for token, score in enumerate(rest["score"]):
            if rest["kind"] == "error" and abs(score or 0) >= _SMALLEST_ERROR * abs(document["y"]):
                yield graph_node(
                    f"err_{layer}_{token}",
                    layer=layer,
                    feature=-1,
                    token=token,
                    n_tokens=n_tokens,
                    clerp=f"{rest['cut']} what the SAE does not explain",
                    feature_type=ERROR,
                    activation=score,
                )


def _logits(document: Document, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Foil, then answer, in a layer above all others."""
    top = max(parse_site(cut).layer for cut in document["cuts"]) + 2
    for name in ("foil", "answer") if "answer" in document["target"] else ():
        token = document["target"][name]
        yield graph_node(
            f"{top}_{token['id']}_{n_tokens - 1}",
            layer=top,
            feature=token["id"],
            token=n_tokens - 1,
            n_tokens=n_tokens,
            clerp=f'Output "{token["text"]}" (p={token["probability"]:.3f})',
            feature_type=LOGIT,
            token_prob=token["probability"],
            is_target_logit=name == "answer",
        )


def _id(feature: str, token: int) -> str:
    found = parse_feature(feature)
    return f"{found.site.layer}_{_number(found)}_{token}"


def _number(feature: FeatureId) -> int:
    """The latent; sites of a layer other than its output get numbers of their own."""
    return feature.latent + IN_LAYER[::-1].index(feature.site.kind) * _SITE


def _ids(supernode: Mapping[str, Any]) -> list[str]:
    return [_id(member["feature"], supernode["token"]) for member in supernode["members"]]


def _strongest(supernode: Mapping[str, Any]) -> str:
    return max(supernode["members"], key=lambda each: abs(each["score"]))["feature"]


def _problems(graph: Any) -> Iterator[Problem]:
    if not isinstance(graph, dict):
        yield Problem(what="not an object", found=type(graph).__name__)
        return
    for key, kind in (("metadata", dict), ("qParams", dict), ("nodes", list), ("links", list)):
        if not isinstance(graph.get(key), kind):
            yield Problem(what="missing, or of another type", where=key, expected=kind.__name__)
            return
    tokens = graph["metadata"].get("prompt_tokens")
    if not isinstance(tokens, list) or not all(isinstance(each, str) for each in tokens):
        yield Problem(what="not a list of texts", where="metadata.prompt_tokens")
        return
    names = set()
    for number, node in enumerate(graph["nodes"]):
        wrong = _wrong(node, _NODE_KEYS)
        if not wrong and not 0 <= node["ctx_idx"] < len(tokens):
            wrong = "ctx_idx is no token of the prompt"
        if wrong:
            yield Problem(what=wrong, where=f"nodes[{number}]")
        else:
            names.add(node["node_id"])
    for number, link in enumerate(graph["links"]):
        wrong = _wrong(link, _LINK_KEYS)
        if not wrong and not {link["source"], link["target"]} <= names:
            wrong = "an end is no node"
        if wrong:
            yield Problem(what=wrong, where=f"links[{number}]")


def _wrong(row: Any, keys: Mapping[str, Any]) -> str:
    if not isinstance(row, dict):
        return "not an object"
    bad = [key for key, kind in keys.items() if not isinstance(row.get(key), kind)]
    return f"{', '.join(bad)}: missing, or of another type" if bad else ""


def _document(graph: Mapping[str, Any]) -> Document:
    meta, pieces = graph["metadata"], graph["metadata"]["prompt_tokens"]
    nodes = [node for node in graph["nodes"] if str(node["layer"]).isdecimal()]
    inner = {n["node_id"]: n for n in nodes if n["feature_type"] != LOGIT}
    groups = _groups(graph, inner)
    of = {name: number for number, (_, members) in enumerate(groups) for name in members}
    answers = [n["node_id"] for n in nodes if n.get("is_target_logit")]
    weights: dict[tuple[int, int], float] = {}
    effect = [0.0] * len(groups)
    for link in graph["links"]:
        a, b = of.get(link["source"]), of.get(link["target"])
        if a is not None and b is not None and a != b:
            weights[a, b] = weights.get((a, b), 0.0) + float(link["weight"])
        if a is not None and link["target"] in answers:
            effect[a] += float(link["weight"])
    layers = sorted({int(n["layer"]) for n in inner.values()})
    answer = next((str(n.get("clerp", "")) for n in nodes if n["node_id"] in answers), "")
    made = [
        _supernode(number, name, [inner[i] for i in members], effect[number])
        for number, (name, members) in enumerate(groups)
    ]
    return {
        "version": VERSION,
        "foreign": str(meta.get("scan", "another tool")),
        "prompt": str(meta.get("prompt") or "".join(pieces)),
        "chat": False,
        "tokens": [],
        "pieces": pieces,
        "target": {"text": answer},
        "y": None,
        "top": [],
        "cuts": [f"L{layer}" for layer in layers],
        "options": {"n_shown": min(12, len(made))},
        "n_groups": len(made),
        "share_removed": None,
        "supernodes": made,
        "edges": [
            {"source": a, "target": b, "predicted": weight, "removed": None, "drawn": True}
            for (a, b), weight in sorted(weights.items(), key=lambda each: -abs(each[1]))
        ],
        "rest": [],
        "checks": [],
    }


def _groups(
    graph: Mapping[str, Any], inner: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """Supernodes by name, then pinned nodes alone; without either the most influential nodes."""
    groups: list[tuple[str, list[str]]] = []
    for each in graph["qParams"].get("supernodes") or []:
        members = [name for name in map(str, each[1:]) if name in inner]
        if members:
            groups.append((str(each[0]), members))
    taken = {name for _, members in groups for name in members}
    pinned = [str(name) for name in graph["qParams"].get("pinnedIds") or []]
    if not groups and not any(name in inner for name in pinned):
        ranked = sorted(inner, key=lambda i: (inner[i].get("influence") or 1.0, i))
        pinned = ranked[:_MOST_FOREIGN]
    alone = [name for name in dict.fromkeys(pinned) if name in inner and name not in taken]
    return groups + [(str(inner[name].get("clerp") or name), [name]) for name in alone]


def _supernode(
    number: int, name: str, members: list[Mapping[str, Any]], effect: float
) -> dict[str, Any]:
    layers = [int(member["layer"]) for member in members]
    return {
        "id": number,
        "name": name,
        "label": name,
        "promotes": [],
        "flow": -1,
        "token": members[0]["ctx_idx"],
        "first_layer": min(layers),
        "last_layer": max(layers),
        "peak": f"L{layers[0]}",
        "predicted": effect,
        "removed": None,
        "control": None,
        "kl": None,
        "differs": False,
        "breaks": False,
        "top": [],
        "doses": [],
        "members": [
            {"feature": str(m["node_id"]), "z": m.get("activation"), "score": None} for m in members
        ],
        "heads": [],
    }
