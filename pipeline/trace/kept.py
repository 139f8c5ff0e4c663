"""Traces on disk: `<run>/traces/<name>/`, one artifact each.

`trace.json` is the whole document (pipeline/trace/document.py), `attribution-graph.json` the form
that other viewers open (pipeline/trace/attribution.py); `nodes`, `supernodes`, `edges` and
`checks` are the same as Parquet tables. The digest is over the options and over the run's
artifacts: model and activations (collect), SAEs, links, labels. A trace of others is refused, and
left out of the atlas.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from featureflow.errors import Command, UserError
from featureflow.files import write_text_atomically
from pipeline.artifact import Artifact, canonical_json
from pipeline.trace.attribution import attribution_of
from pipeline.trace.document import VERSION, Document
from pipeline.trace.trace import Trace

if TYPE_CHECKING:
    from pipeline.run import Run

KIND, SCHEMA, FOLDER = "trace", 1, "traces"
DOCUMENT, GRAPH = "trace.json", "attribution-graph.json"
_SLUG = 40
_STAGES = ("collect", "train", "link", "describe")


def write_trace(found: Trace, document: Document, run: Run) -> Artifact:
    """Keep a trace with its run; the same prompt and options replace it. Raises UserError for a run
    whose artifacts do not belong together."""
    inputs = {stage: run.artifact(stage).digest for stage in _STAGES if run.has(stage)}
    names = ("prompt", "tokens", "target", "cuts", "options")
    config: dict[str, Any] = {name: document[name] for name in names}
    nodes = found.traced.nodes.join(found.nodes["group"].rename("supernode"))
    flat = [
        {k: v for k, v in node.items() if k not in ("members", "heads", "doses", "top", "promotes")}
        for node in document["supernodes"]
    ]
    tables = {
        "nodes": nodes,
        "supernodes": pd.DataFrame(flat),
        "edges": found.edges,
        "checks": found.checks,
        "heads": found.heads,
    }
    return _write(run.root, document, config, inputs, tables)


def write_foreign(document: Document, run: Run) -> Artifact:
    """Keep an attribution graph of another tool beside the run's traces; it depends on nothing."""
    return _write(run.root, document, {"graph": document}, {}, {})


def open_trace(root: Path, name: str) -> Artifact:
    """The artifact of a trace. Raises UserError when there is none of this name."""
    if not re.fullmatch(r"[a-z0-9-]+", name):
        known = sorted(path.parent.name for path in (root / FOLDER).glob("*/manifest.json"))
        raise UserError(f"there is no trace {name!r}", expected=", ".join(known) or None)
    return Artifact.open(
        root / FOLDER / name, kind=KIND, schema=SCHEMA, fix=Command("trace", "PROMPT")
    )


def read_document(artifact: Artifact) -> Document:
    """What was written. Raises UserError for a document of another version."""
    path = artifact.file(DOCUMENT)
    document = json.loads(path.read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
        found = str(document.get("version"))
        raise UserError(
            "a trace of another version", where=str(path), expected=str(VERSION), found=found
        )
    return document


def fitting_traces(root: Path, digests: Mapping[str, str]) -> dict[str, Artifact]:
    """The traces in a run's folder that were made from artifacts with these digests."""
    found = {}
    for path in sorted((root / FOLDER).glob("*/manifest.json")):
        with suppress(UserError):
            artifact = open_trace(root, path.parent.name)
            if artifact.inputs.items() <= digests.items():
                found[artifact.path.name] = artifact
    return found


def name_of(document: Document, config: Mapping[str, Any]) -> str:
    """The name of a trace's folder: its prompt and a digest of its options."""
    words = re.sub(r"[^a-z0-9]+", "-", document["prompt"].lower()).strip("-")[:_SLUG].rstrip("-")
    digest = hashlib.sha256(canonical_json(config).encode()).hexdigest()[:6]
    return "-".join(filter(None, (words, digest)))


def _write(
    root: Path,
    document: Document,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame],
) -> Artifact:
    out = root / FOLDER / name_of(document, config)
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=inputs) as draft:
        for name, table in tables.items():
            table.to_parquet(draft.path / f"{name}.parquet", index=False)
        write_text_atomically(draft.path / DOCUMENT, canonical_json(document) + "\n")
        if "foreign" not in document:
            graph = attribution_of(document, slug=out.name)
            write_text_atomically(draft.path / GRAPH, canonical_json(graph) + "\n")
        draft.summary.update({"prompt": document["prompt"], "y": document["y"]})
    return Artifact.open(out, kind=KIND, schema=SCHEMA)
