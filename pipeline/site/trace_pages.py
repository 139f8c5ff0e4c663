"""Kept traces → `traces/<name>`, a page each: the document of pipeline/trace/document.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.site.shards import Shard, write_shard
from pipeline.trace.document import headline_of
from pipeline.trace.kept import read_document


def write_traces(site: Path, traces: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Write the pages; returns their entries in the manifest."""
    entries = []
    for name, artifact in traces.items():
        document = read_document(artifact)
        write_shard(site, f"traces/{name}", Shard(json=document))
        headline = headline_of(document)
        entries.append({"name": name, "prompt": document["prompt"], "headline": headline})
    return entries
