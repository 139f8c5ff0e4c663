"""A feature's flow as text for a terminal: what it is, the chain through it, what feeds each step,
where it forks.

L12/402   translated · density 0.4 % · lives L8 … L15
  L8/77        born here
  L9/90        0.81  q 0.0002  r 0.74   + L9.mlp/5 (0.44)
▶ L12/402      0.93  q 0.0002  r 0.88   causal 0.81 (n 12)
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from featureflow.sites import FeatureId
from pipeline.flow.graph import FlowGraph
from pipeline.flow.queries import ChainStep

Labels = Callable[[str], str]


def describe_flow(
    graph: FlowGraph, feature: FeatureId | str, *, label_of: Labels | None = None, n_others: int = 5
) -> str:
    """Several lines; `label_of` gives the label of a feature id (an atlas has one)."""
    node = graph.node(feature)
    name = f"{node['site']}/{node['latent']}"
    chain = graph.chain(feature)
    lines = [_head(name, node, chain, label_of), ""]
    if (
        len(chain) == 1
        and not len(graph.predecessors(feature))
        and not len(graph.successors(feature))
    ):
        return "\n".join(
            [
                *lines,
                "No link of this feature is stronger than chance at the chosen rate.",
                _nearest(graph, node),
            ]
        )
    lines += [
        _chain_line(graph, step, first=not place, here=str(step.feature) == name, label_of=label_of)
        for place, step in enumerate(chain)
    ]
    before = [str(step.feature) for step in chain]
    lines += _others("flows in from", graph.predecessors(feature), "source", before, n_others)
    lines += _others("flows on to", graph.successors(feature), "target", before, n_others)
    members = (
        int((graph.nodes["community"] == node["community"]).sum()) if node["community"] >= 0 else 0
    )
    if members:
        lines += ["", f"community {node['community']}: {members} features"]
    return "\n".join(lines)


def _head(name: str, node: pd.Series, chain: list[ChainStep], label_of: Labels | None) -> str:
    parts = [str(node["class"]) if isinstance(node["class"], str) else "class unknown"]
    if not node["alive"]:
        parts = ["dead"]
    if not pd.isna(node["density"]):
        parts.append(f"active on {100 * node['density']:.2g} % of tokens")
    first, last = chain[0].feature.site.short, chain[-1].feature.site.short
    parts.append(f"lives {first} … {last}" if first != last else f"lives at {first} only")
    label = f"   “{label_of(name)}”" if label_of else ""
    return f"{name}{label}   {' · '.join(parts)}"


def _chain_line(
    graph: FlowGraph, step: ChainStep, *, first: bool, here: bool, label_of: Labels | None
) -> str:
    mark = "▶" if here else " "
    link = "starts here" if first else _evidence(graph, step)
    leaves = "".join(
        f"  + {leaf.feature} ({leaf.cosine:.2f})" for leaf in graph.leaves(step.feature)
    )
    label = f"  “{label_of(str(step.feature))}”" if label_of else ""
    return f"{mark} {step.feature!s:<14}{link:<34}{leaves}{label}".rstrip()


def _evidence(graph: FlowGraph, step: ChainStep) -> str:
    parts = [f"{step.cosine:.2f}", f"q {step.q_value:.2g}"]
    row = graph.edges.iloc[step.edge] if step.edge is not None else None
    if row is not None and not pd.isna(row["pearson"]):
        parts.append(f"r {row['pearson']:.2f}")
    if row is not None and not pd.isna(row.get("gradient_effect")):
        parts.append(f"gradient {row['gradient_effect']:+.2f}")
    if row is not None and not pd.isna(row.get("causal_success")):
        parts.append(f"causal {row['causal_success']:.2f} (n {int(row['causal_n'])})")
    return "  ".join(parts)


def _others(title: str, edges: pd.DataFrame, end: str, shown: list[str], n: int) -> list[str]:
    names = edges[f"{end}_site"].astype(str) + "/" + edges[f"{end}_latent"].astype(str)
    rest = edges[~names.isin(shown)]
    if not len(rest):
        return []
    listed = [
        f"{name} ({cosine:.2f})"
        for name, cosine in zip(names[rest.index], rest["cosine"], strict=True)
    ]
    more = f"  and {len(listed) - n} more" if len(listed) > n else ""
    return ["", f"also {title}:  " + "  ".join(listed[:n]) + more]


def _nearest(graph: FlowGraph, node: pd.Series) -> str:
    edges = graph.edges
    here = edges[
        (edges["target_site"] == node["site"])
        & (edges["target_latent"] == node["latent"])
        & (edges["rank"] == 0)
    ]
    found = [
        f"{row.source_site}/{row.source_latent} ({row.cosine:.2f}, q {row.q_value:.2g})"
        for row in here.itertuples()
    ]
    return "Nearest before it: " + ", ".join(found) if found else "Nothing before it was compared."
