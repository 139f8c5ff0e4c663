"""Traces of 60 packaged prompts in five families against what really happens.

    python -m benchmarks.trace_prompts artifacts/laptop --out /tmp/traces.jsonl

Per prompt, with the default options: the checks of the trace; single features removed (four of the
largest score and two random active ones a cut) against their score; edges from these to the six
features of the largest score at the next cut, against the gradient, the gradient with attention
patterns and norm scales held, and the cosine of the decoder rows; groups of the size of each
supernode that are drawn from the same cuts (at random from the features kept, and by the largest
activations); the strongest features of single cuts, and of all cuts together, kept alone or taken
out; and which links of the flow graph are live: both ends active on one token. Every prompt is a
line of the file, in turn from the families, and a second call goes on where the first was stopped.
Intervals are 95 %, bootstrap over prompts. The prompts were written before the model was run on any
of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from featureflow.statistics import bootstrap, bootstrap_mean
from pipeline.console import table
from pipeline.run import Run
from pipeline.trace.batch import read_prompts
from pipeline.trace.checks import completeness
from pipeline.trace.edges import node_edges
from pipeline.trace.frozen import frozen
from pipeline.trace.stream import FEATURE, Traced, edited, traced
from pipeline.trace.supernodes import flows_of, prediction, strongest
from pipeline.trace.trace import Trace

_N_TOP, _N_RANDOM, _N_TARGETS = 4, 2, 6
_MIDDLE, _NEIGHBOURS = (11, 14, 17, 20, 23), (6, 13, 20, 27)
_BANDS = {"L0–L8": (0, 8), "L11–L20": (9, 20), "L23–L29": (21, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="file of results, one line a prompt"
    )
    parser.add_argument("--n", type=int, default=60, help="prompts, in turn from the families")
    parser.add_argument("--summary", action="store_true", help="only sum up what the file has")
    parser.add_argument(
        "--table", type=Path, help="write what is summed up to this JSON-lines file"
    )
    arguments = parser.parse_args()
    if not arguments.summary:
        measure(Run.open(arguments.run), arguments.out, arguments.n)
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    for line in summary(rows):
        print(line)
    if arguments.table is not None:
        names = ("what", "value", "interval", "prompts")
        lines = [json.dumps(dict(zip(names, line, strict=True))) for line in _lines(rows)]
        arguments.table.write_text("\n".join(lines) + "\n")


def prompts() -> list[dict[str, Any]]:
    """In turn from the families, so that the first n are balanced."""
    path = resources.files("pipeline.trace") / "prompts.jsonl"
    asked = read_prompts(Path(str(path)))
    place: dict[str, int] = {}
    for each in asked:
        each["turn"] = place[each["family"]] = place.get(each["family"], -1) + 1
    return sorted(asked, key=lambda each: each["turn"])


def measure(run: Run, out: Path, n: int) -> None:
    done = (
        {json.loads(line)["prompt"] for line in out.read_text().splitlines()}
        if out.exists()
        else ()
    )
    for each in prompts()[:n]:
        if each["prompt"] in done:
            continue
        asked = {k: v for k, v in each.items() if k in ("answer", "foil", "feature", "chat")}
        started = time.process_time()
        try:
            found = run.trace(each["prompt"], **asked)
        except UserError as error:
            result: dict[str, Any] = {"error": str(error)}
        else:
            seconds = time.process_time() - started
            result = {
                "seconds": seconds,
                **one(found, flows_of(run.graph, found.traced.cuts)),
                **live_links(found.traced, run),
            }
        line = json.dumps({"prompt": each["prompt"], "family": each["family"], **result})
        with out.open("a") as stream:
            stream.write(line + "\n")
        print(each["family"], each["prompt"][:50], round(result.get("seconds", 0), 1), flush=True)


def one(trace: Trace, flows: dict[str, int]) -> dict[str, Any]:
    """All that is measured on one prompt."""
    found, generator = trace.traced, np.random.default_rng(0)
    nodes, edges = nodes_and_edges(found, generator, flows)
    p = found.logits.softmax(-1)
    target = found.target
    columns = ["predicted", "removed", "control", "kl", "differs", "breaks", "flow"]
    return {
        "n_tokens": len(found.ids),
        "y": found.y,
        "p_answer": float(p[target.answer]),
        "p_foil": float(p[target.foil]),
        "answer_is_first": bool(p.argmax() == target.answer),
        "n_nodes": len(trace.nodes),
        "n_groups": trace.n_groups,
        "share_removed": trace.share_removed,
        "checks": {row.check: row.value for row in trace.checks.itertuples()},
        "goes": {row.check: "goes" in row.note for row in trace.checks.itertuples()},
        "supernodes": trace.supernodes[columns].to_dict("list"),
        "groups": groups(trace, generator),
        "nodes": nodes,
        "edges": edges,
        "memory_gb": psutil.Process().memory_info().rss / 1e9,
        "last_cut": _last_cut(found),
        "completeness": {
            cut.short: completeness(found, cut)[1] for cut in found.cuts if cut.layer in _MIDDLE
        },
        "sets": sets_of(found, generator),
    }


def _last_cut(found: Traced) -> float:
    """|Σ − y| / |y| of the last cut's parts, with the scale of the norm after it held."""
    with frozen(found.model):
        last = traced(found.model, found.saes, found.ids, found.cuts[-1:], found.target)
    return abs(float(last.nodes["score"].sum()) - found.y) / abs(found.y)


def sets_of(found: Traced, generator: np.random.Generator) -> list[dict[str, Any]]:
    """y, KL and whether the first token stays with nothing but the strongest features of a cut
    (80 % of the score), and without the strongest (50 %): by score, activation, and chance. At
    single cuts of the middle; `all`: at all cuts together."""
    features = found.nodes[found.nodes["kind"] == FEATURE]
    cuts = [cut.short for cut in found.cuts if cut.layer in _MIDDLE]
    parts = {cut: features[features["cut"] == cut] for cut in cuts} | {"all": features}
    names: list[tuple[str, str, str, int]] = [("", "whole", "", 0)]
    sets = [features.iloc[:0]]
    for cut, here in parts.items():
        names.append((cut, "none", "", 0))
        sets.append(here)
        for way, share in (("keep", 0.8), ("without", 0.5)):
            n = strongest(here, share)["cut"].value_counts(sort=False)
            for by in ("score", "z", "random"):
                value = generator.random(len(here)) if by == "random" else here[by].abs()
                order = here.assign(value=value).sort_values("value", ascending=False)
                best = pd.concat([order[order["cut"] == c].head(k) for c, k in n.items()])
                names.append((cut, way, by, len(best)))
                sets.append(here.drop(best.index) if way == "keep" else best)
    gone = edited(found, sets)
    log_p = gone.logits.log_softmax(-1)
    kl = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1)
    stays = log_p.argmax(-1) == log_p[0].argmax()
    return [
        {"cut": cut, "way": way, "by": by, "n": n, "y": y, "kl": k, "stays": stay}
        for (cut, way, by, n), y, k, stay in zip(
            names, gone.y.tolist(), kl.tolist(), stays.tolist(), strict=True
        )
    ]


def live_links(found: Traced, run: Run) -> dict[str, Any]:
    """Of the active features of every residual layer: how many have a kept link from the layer
    before, and how often its source is active on the same token; null: the source of another link
    between the two layers. `gap`: for the six strongest targets of two layers, the gradient's
    effect of the linked source among all active sources."""
    stream = [site for site in run.saes if site.kind == "resid_post"]
    with torch.no_grad():
        seen = found.model.activations(torch.tensor([found.ids]), stream)
    links, rng = run.graph.links, np.random.default_rng(0)
    links = links[(links["relation"] == "residual") & (links["rank"] == 0)]
    active = {site: run.saes[site].encode(h[0, 1:].float()) > 0 for site, h in seen.items()}
    counts = np.zeros(4, dtype=int)
    for before, after in pairwise(stream):
        here = links[(links["source_site"] == before.short) & (links["target_site"] == after.short)]
        source, target = (
            here[end].to_numpy(copy=True) for end in ("source_latent", "target_latent")
        )
        on, first = active[after][:, target], active[before]
        both = on & first[:, source]
        null = on & first[:, rng.permutation(source)]
        n = (active[after].sum(), on.sum(), both.sum(), null.sum())
        counts += [int(each) for each in n]
    return {
        "links": counts.tolist(),
        "gap": [each for e in _NEIGHBOURS for each in _gap(found, run, e, links)],
    }


def _gap(found: Traced, run: Run, layer: int, links: pd.DataFrame) -> list[dict[str, float]]:
    """Neighbouring layers: what the linked source does for each of the strongest targets."""
    cuts = [Site(layer - 1, "resid_post"), Site(layer, "resid_post")]
    near = traced(found.model, run.saes, found.ids, cuts, found.target)
    features = near.nodes[near.nodes["kind"] == FEATURE]
    targets = features[features["cut"] == cuts[1].short]
    targets = targets.loc[targets["score"].abs().nlargest(_N_TARGETS).index]
    linked = links[links["target_site"] == cuts[1].short].set_index("target_latent")
    edges, rows = node_edges(near, targets), []
    for target, each in edges.groupby("target"):
        node = features.loc[target]
        here = features.loc[each["source"]].assign(effect=each["predicted"].to_numpy())
        same = here[here["token"] == node["token"]]
        if same.empty:
            continue
        size = here["effect"].abs().sum()
        rows_before = near.saes[cuts[0]].W_dec[same["latent"].tolist()]
        by_cosine = same["effect"].iloc[int((rows_before @ _row(near, node)).argmax())]
        row = {
            "same_token": float(same["effect"].abs().sum() / size),
            "strongest": float(same["effect"].abs().max() / size),
            "by_cosine": float(abs(by_cosine) / size),
        }
        if node["latent"] in linked.index:
            source = linked.loc[node["latent"], "source_latent"]
            own = same[same["latent"] == source]["effect"].abs()
            row["linked"] = float(own.sum() / size)
            row["linked_live"] = float(len(own) > 0)
            row["linked_first"] = float(len(own) > 0 and own.iloc[0] == same["effect"].abs().max())
        rows.append(row)
    return rows


def nodes_and_edges(
    found: Traced, generator: np.random.Generator, flows: dict[str, int]
) -> tuple[dict[str, list], dict[str, list]]:
    features = found.nodes[found.nodes["kind"] == FEATURE]
    sources, targets = [], []
    for number, cut in enumerate(found.cuts):
        here = features[features["cut"] == cut.short]
        top = here["score"].abs().nlargest(max(_N_TOP, _N_TARGETS)).index
        rest = generator.choice(here.index, min(_N_RANDOM, len(here)), replace=False)
        sources += [(i, "top") for i in top[:_N_TOP]] + [(int(i), "random") for i in rest]
        targets += list(top[:_N_TARGETS]) if number else []
    aims = features.loc[targets]
    readings = [
        (parse_site(row.cut), int(row.token), [int(row.latent)], torch.ones(1))
        for row in aims.itertuples()
    ]
    none = found.nodes.iloc[:0]
    gone = edited(found, [none, *(found.nodes.loc[[i]] for i, _ in sources)], readings=readings)
    real = (gone.y[0] - gone.y[1:]).tolist()
    change = (gone.read[0] - gone.read[1:]).numpy()
    guess = node_edges(found, aims).set_index(["source", "target"])["predicted"]
    with frozen(found.model):
        held = node_edges(found, aims).set_index(["source", "target"])["predicted"]
    order = {cut.short: number for number, cut in enumerate(found.cuts)}
    rows = []
    for s, (i, kind) in enumerate(sources):
        a = features.loc[i]
        for t, j in enumerate(targets):
            b = features.loc[j]
            if (
                kind == "top"
                and order[b["cut"]] == order[a["cut"]] + 1
                and b["token"] >= a["token"]
            ):
                cosine = _row(found, a) @ _row(found, b)
                flow = [
                    flows.get(f"{x['cut']}/{x['latent']}", -1 - n) for n, x in enumerate((a, b))
                ]
                rows.append(
                    (
                        float(guess[i, j]),
                        float(change[s, t]),
                        float(held[i, j]),
                        float(cosine),
                        bool(a["token"] == b["token"]),
                        bool(flow[0] == flow[1]),
                    )
                )
    names = ("predicted", "real", "held", "cosine", "same_token", "same_flow")
    edges = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    nodes = {
        "cut": [str(features.loc[i, "cut"]) for i, _ in sources],
        "kind": [kind for _, kind in sources],
        "predicted": [float(features.loc[i, "score"]) for i, _ in sources],
        "real": real,
    }
    return nodes, edges


def _row(found: Traced, node: pd.Series) -> torch.Tensor:
    return found.saes[parse_site(node["cut"])].W_dec[int(node["latent"])]


def groups(trace: Trace, generator: np.random.Generator) -> dict[str, Any]:
    """Effects of groups as large as each supernode, at the same cuts: random features of those
    that were kept, and the largest activations; with the prediction of either."""
    found, kept = trace.traced, trace.nodes
    drawn: dict[str, list[pd.DataFrame]] = {"random kept": [], "largest activations": []}
    by_z = kept.sort_values("z", ascending=False)
    taken: dict[str, int] = {}
    for number in trace.supernodes["supernode"].sort_values():
        sizes = trace.members(number)["cut"].value_counts(sort=False)
        random, largest = [], []
        for cut, n in sizes.items():
            here = by_z[by_z["cut"] == cut]
            random += list(generator.choice(here.index, min(int(n), len(here)), replace=False))
            start = taken.get(str(cut), 0)
            largest += list(here.index[start : start + int(n)])
            taken[str(cut)] = start + int(n)
        drawn["random kept"].append(kept.loc[random])
        drawn["largest activations"].append(kept.loc[largest])
    sets = [each for group in drawn.values() for each in group]
    gone = edited(found, sets)
    found_y = iter((found.y - gone.y).tolist())
    return {
        name: {
            "predicted": [
                float(prediction(each.assign(group=0)).iloc[0]) if len(each) else 0.0
                for each in group
            ],
            "removed": [next(found_y) for _ in group],
        }
        for name, group in drawn.items()
    }


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Every number with its interval over prompts."""
    wrong = [row for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    families = pd.Series([row["family"] for row in rows]).value_counts()
    yield f"{len(rows)} prompts ({', '.join(f'{k} {v}' for k, v in families.items())})"
    yield from (f"not traced: {row['prompt']}: {row['error']}" for row in wrong)
    yield from table(list(_lines(rows)), header=("what", "value", "95 %", "prompts"))


def _lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    def mean(name: str, values: list[float]) -> tuple[str, str, str, str]:
        found = bootstrap_mean(values, seed=0)
        return name, f"{found.mean:.3g}", f"{found.low:.3g} to {found.high:.3g}", str(found.n)

    for name in ("seconds", "n_tokens", "y", "p_answer", "n_nodes", "n_groups", "share_removed"):
        yield mean(name, [row[name] for row in rows])
    yield mean("answer is the likeliest token", [row["answer_is_first"] for row in rows])
    for check in rows[0]["checks"]:
        yield mean(check, [row["checks"].get(check, np.nan) for row in rows])
        if check.startswith(("keep", "without")):
            yield mean(f"{check}: top token stays", [not row["goes"][check] for row in rows])
    for band, (low, high) in _BANDS.items():
        for kind in ("top", "random"):
            picked = [_nodes_of(row, low, high, kind) for row in rows]
            yield mean(f"nodes {band} {kind}: rank", [_rank(each) for each in picked])
            yield mean(f"nodes {band} {kind}: size of error", [_error(each) for each in picked])
    for name, keep in _EDGES.items():
        picked = [_edges_of(row, keep) for row in rows]
        yield mean(f"edges {name}: rank", [_rank(each) for each in picked])
        yield mean(f"edges {name}: size of error", [_error(each) for each in picked])
        cosine = [_rank(each, "cosine") for each in picked]
        yield mean(f"edges {name}: rank by decoder cosine", cosine)
        yield mean(f"edges {name}: rank with all held", [_rank(each, "held") for each in picked])
        held = [each.assign(predicted=each["held"]) for each in picked]
        yield mean(f"edges {name}: size of error, held", [_error(each) for each in held])
        share = [
            float(each["real"].abs().sum() / max(sum(map(abs, row["edges"]["real"])), 1e-9))
            for row, each in zip(rows, picked, strict=True)
        ]
        yield mean(f"edges {name}: share of the effect", share)
    edges = [pd.DataFrame(row["edges"]) for row in rows]
    for other in ("held", "cosine"):
        better = [_rank(each) - _rank(each, other) for each in edges]
        yield mean(f"edges: gradient less {other}, rank", better)
    yield from _set_lines(rows)
    yield from _link_lines(rows)
    yield mean("last cut, norm's scale held: |Σ − y| / |y|", [row["last_cut"] for row in rows])
    for cut in rows[0]["completeness"]:
        values = [row["completeness"].get(cut, np.nan) for row in rows]
        yield mean(f"integrated gradients against removal, {cut}", values)
    whole = [pd.DataFrame(row["supernodes"]) for row in rows]
    effect = [float(each["removed"].abs().mean()) for each in whole]
    yield mean("supernodes: mean |effect|", effect)
    yield mean(
        "supernodes: on a flow of two members or more", [(e["flow"] >= 0).mean() for e in whole]
    )
    yield mean("supernodes: prediction differs", [float(each["differs"].mean()) for each in whole])
    yield mean("supernodes: removal breaks the text", [float(e["breaks"].mean()) for e in whole])
    for name, group in (("random active", None), ("random kept", 1), ("largest activations", 2)):
        other = [
            float(each["control"].abs().mean())
            if group is None
            else float(np.abs(row["groups"][name]["removed"]).mean())
            for row, each in zip(rows, whole, strict=True)
        ]
        ratio = bootstrap(
            lambda w, other=other: (w @ np.array(effect)) / (w @ np.array(other)), len(rows), seed=0
        )
        interval = f"{ratio.low:.3g} to {ratio.high:.3g}"
        yield f"supernodes: |effect| by {name}", f"{ratio.mean:.3g}", interval, str(ratio.n)
        if group is not None:
            frames = [pd.DataFrame(row["groups"][name]) for row in rows]
            frames = [frame.rename(columns={"removed": "real"}) for frame in frames]
            yield mean(f"groups of {name}: rank", [_rank(frame) for frame in frames])
            yield mean(f"groups of {name}: size of error", [_error(frame) for frame in frames])


def _set_lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Single cuts averaged, and all cuts together: how often the first token stays, pooled share of
    the effect that is kept (F), KL."""
    frames = [pd.DataFrame(row["sets"]).assign(prompt=i) for i, row in enumerate(rows)]
    whole = pd.concat(frames)
    y = whole[whole["way"] == "whole"].set_index("prompt")["y"]
    none = whole[whole["way"] == "none"].set_index(["prompt", "cut"])["y"]
    whole = whole[whole["way"].isin(["keep", "without"])].copy()
    whole["cuts"] = np.where(whole["cut"] == "all", "all cuts", "one cut")
    key = pd.MultiIndex.from_frame(whole[["prompt", "cut"]])
    whole["kept"] = whole["y"] - none.reindex(key).to_numpy()
    whole["all"] = y.reindex(whole["prompt"]).to_numpy() - none.reindex(key).to_numpy()
    order = ["cuts", "way", "by"]
    for (cuts, way, by), here in whole.groupby(order, sort=False):
        each = here.groupby("prompt")[["stays", "kl", "kept", "all", "n"]].mean()
        name = f"{way} by {by}, {cuts} ({each['n'].mean():.0f} features)"
        for column, what in (("stays", "first token stays"), ("kl", "KL")):
            found = bootstrap_mean(each[column].tolist(), seed=0)
            yield (
                f"{name}: {what}",
                f"{found.mean:.3g}",
                f"{found.low:.3g} to {found.high:.3g}",
                str(found.n),
            )
        if way == "keep":
            a, b = each["kept"].to_numpy(), each["all"].to_numpy()
            pooled = bootstrap(lambda w, a=a, b=b: (w @ a) / (w @ b), len(each), seed=0)
            interval = f"{pooled.low:.3g} to {pooled.high:.3g}"
            yield f"{name}: pooled F", f"{pooled.mean:.3g}", interval, str(pooled.n)


def _link_lines(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Which links of the flow graph are live on prompts, and what their sources do there."""
    active, linked, live, null = np.array([row["links"] for row in rows], dtype=float).T
    for name, a, b in (
        ("links: active targets that have one", linked, active),
        ("links: of these, source active on the token", live, linked),
        ("links: of these, another link's source", null, linked),
    ):
        found = bootstrap(lambda w, a=a, b=b: (w @ a) / (w @ b), len(rows), seed=0)
        yield name, f"{found.mean:.3g}", f"{found.low:.3g} to {found.high:.3g}", str(found.n)
    names = {
        "same_token": "share of |gradient effect| from the token itself",
        "strongest": "share of the strongest source there",
        "by_cosine": "share of the source of the largest cosine",
        "linked": "share of the linked source, targets with a link",
        "linked_live": "linked source is active",
        "linked_first": "linked source is the strongest",
    }
    gaps = [pd.DataFrame(row["gap"], columns=list(names)) for row in rows]
    for column, name in names.items():
        found = bootstrap_mean([float(each[column].mean()) for each in gaps], seed=0)
        interval = f"{found.low:.3g} to {found.high:.3g}"
        yield f"layer to layer: {name}", f"{found.mean:.3g}", interval, str(found.n)


_EDGES = {
    "all": lambda e: e["real"] == e["real"],
    "same flow, same token": lambda e: e["same_flow"] & e["same_token"],
    "other flow, same token": lambda e: ~e["same_flow"] & e["same_token"],
    "other token": lambda e: ~e["same_token"],
}


def _nodes_of(row: dict[str, Any], low: int, high: int, kind: str) -> pd.DataFrame:
    frame = pd.DataFrame(row["nodes"])
    layer = frame["cut"].map(lambda cut: parse_site(cut).layer)
    return frame[layer.between(low, high) & (frame["kind"] == kind)]


def _edges_of(row: dict[str, Any], keep: Any) -> pd.DataFrame:
    frame = pd.DataFrame(row["edges"])
    return frame[keep(frame)]


def _rank(frame: pd.DataFrame, by: str = "predicted") -> float:
    known = len(frame) > 2 and frame[by].nunique() > 1 and frame["real"].nunique() > 1
    return float(frame[by].corr(frame["real"], method="spearman")) if known else float("nan")


def _error(frame: pd.DataFrame) -> float:
    size = float(frame["real"].abs().sum())
    return float((frame["predicted"] - frame["real"]).abs().sum()) / size if size else float("nan")


if __name__ == "__main__":
    main()
