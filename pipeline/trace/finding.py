"""A trace as a finding: kept in `<run>/lenses/trace-<slug>` beside the lenses' findings, shown in
the atlas as they are, and refused once the run's artifacts are others.

Tables: supernodes, edges, checks, nodes. The figure has a column a token and a row a layer; a
supernode is a bar over its layers, as wide as the change of y without it, hatched where the
gradient predicted something else.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from featureflow.figures import COLOURS, panels
from pipeline.artifact import Artifact
from pipeline.findings import FOLDER, KIND, SCHEMA, Finding, write_finding
from pipeline.run import Run
from pipeline.trace.prompt import headline_of, lines_of, name_of
from pipeline.trace.trace import Trace

_SLUG = 40


def write_trace(found: Trace, run: Run, prompt: str) -> Artifact:
    """Keep a trace with its run; the same prompt and options replace it."""
    tokenizer, config = run.exact_model.tokenizer, _config(found, prompt)
    name = _slug(prompt, config)
    needs = ["collect", "train", *(stage for stage in ("link", "describe") if run.has(stage))]
    inputs = {stage: run.artifact(stage).digest for stage in needs}
    contents: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "config": config}
    with Artifact.create(run.root / FOLDER / name, **contents, inputs=inputs) as draft:
        finding = finding_of(found, run)
        title = f"Trace: {prompt} → {headline_of(found, tokenizer)}"
        write_finding(finding, draft.path, name=name, title=title)
        draft.summary.update(finding.headline)
    return Artifact.open(run.root / FOLDER / name, kind=KIND, schema=SCHEMA)


def finding_of(found: Trace, run: Run) -> Finding:
    """Tables, the terminal's lines as text, and the figure."""
    tokenizer = run.exact_model.tokenizer
    pieces = [tokenizer.token_text(i) for i in found.traced.ids]
    rows = found.supernodes.to_dict(orient="records")
    says = [
        ", ".join(f"{tokenizer.token_text(t)!r} {p:.2f}" for t, p in pairs)
        for pairs in (zip(r["top_tokens"], r["top_probabilities"], strict=True) for r in rows)
    ]
    supernodes = found.supernodes.drop(columns=["top_tokens", "top_probabilities"]).assign(
        name=[name_of(row, run) for row in rows],
        on=[pieces[row["token"]] for row in rows],
        says_then=says,
        peak_feature=[_at_peak(row) for row in rows],
    )
    nodes = found.traced.nodes.rename(columns={"cut": "cut_site"})
    nodes["feature"] = found.nodes["feature"].reindex(nodes.index)
    nodes["supernode"] = found.nodes["group"].reindex(nodes.index)
    checks = found.checks.set_index("check")["value"]
    return Finding(
        tables={
            "supernodes": supernodes.rename(columns={"peak": "peak_site"}),
            "edges": found.edges,
            "checks": found.checks,
            "nodes": nodes.dropna(subset=["supernode"]),
        },
        text="\n".join(f"    {line}" for line in lines_of(found, run)),
        headline={"y": found.traced.y, "identity": float(checks["identity"])},
        figure=partial(_figure, supernodes.head(found.options.n_shown), pieces),
    )


def _at_peak(row: dict[str, Any]) -> str:
    features = str(row["features"]).split(" ")
    return next(name for name in features if name.startswith(f"{row['peak']}/"))


def _figure(supernodes: pd.DataFrame, pieces: list[str]) -> Figure:
    figure, (axis,) = panels(width=max(4.0, 0.8 * len(pieces)))
    largest = max(float(supernodes["removed"].abs().max()), 1e-9)
    beside: dict[int, int] = {}
    for row in supernodes.to_dict(orient="records"):
        place = beside.setdefault(row["token"], 0)
        beside[row["token"]] += 1
        bottom, height = row["first_layer"] - 0.4, row["last_layer"] - row["first_layer"] + 0.8
        axis.bar(
            row["token"] - 0.3 + 0.12 * place,
            height,
            bottom=bottom,
            width=0.02 + 0.1 * abs(row["removed"]) / largest,
            color=COLOURS[0] if row["removed"] > 0 else COLOURS[1],
            hatch="///" if row["differs"] else None,
        )
        axis.annotate(
            f"S{row['supernode']} {row['removed']:+.1f}",
            (row["token"] - 0.3 + 0.12 * place, bottom + height),
            fontsize=5,
            rotation=90,
            ha="center",
        )
    axis.set_xticks(
        range(len(pieces)), [piece.replace("$", r"\$") for piece in pieces], rotation=45
    )
    axis.set_ylabel("layer")
    return figure


def _config(found: Trace, prompt: str) -> dict[str, Any]:
    target = found.traced.target
    feature = None if target.feature is None else f"{target.feature}@{target.token}"
    return {
        "prompt": prompt,
        "ids": list(found.traced.ids),
        "answer": target.answer,
        "foil": target.foil,
        "feature": feature,
        "cuts": [site.short for site in found.traced.cuts],
        **asdict(found.options),
    }


def _slug(prompt: str, config: dict[str, Any]) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG].rstrip("-")
    digest = hashlib.sha256(repr(sorted(config.items())).encode()).hexdigest()[:6]
    return "-".join(filter(None, ("trace", words, digest)))
