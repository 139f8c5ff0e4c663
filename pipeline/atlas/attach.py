"""Later stages hand the atlas something to show: `site/attached/` is the one part of it that may still change.

The artifact's manifest lists every file, so it is told too: first it forgets the file, then the file is replaced,
then it
learns the new size and checksum. Killed at any point, the atlas still opens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, write_text_atomically
from pipeline.atlas.site_folder import NO_STEERING, VERSION, write_steering
from sae.errors import Problem, UserError

STEERING = "site/attached/steering.js"
_TEXTS = ("feature", "arm", "prompt", "unsteered", "steered")


def attach_steering(atlas_folder: Path | str, document: Mapping[str, Any]) -> None:
    """Let the atlas show steering samples: `attached/steering` of docs/decisions/0003-atlas-shards.md. An earlier
    attachment is replaced. Raises UserError when there is no atlas or the document has another form."""
    folder = Path(atlas_folder)
    if not (folder / "site" / "manifest.json").is_file():
        raise UserError(
            "there is no atlas here", where=str(folder), expected="site/manifest.json", mend="featureflow atlas"
        )
    problems = _problems_of(document)
    if problems:
        raise UserError("not steering samples", problems=tuple(problems))
    _record(folder, None)
    beside = folder / "site" / "attached.new"
    made = write_steering(beside, {**NO_STEERING, **document})
    (folder / STEERING).parent.mkdir(exist_ok=True)
    made.replace(folder / STEERING)
    made.parent.rmdir()
    beside.rmdir()
    _record(folder, folder / STEERING)


def _record(folder: Path, path: Path | None) -> None:
    """Write the file's size and checksum into the artifact's manifest, or take them out."""
    manifest = folder / MANIFEST
    if not manifest.is_file():  # a site on its own, without the artifact around it
        return
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["files"].pop(STEERING, None)
    if path is not None:
        content = path.read_bytes()
        document["files"][STEERING] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_text_atomically(manifest, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _problems_of(document: Mapping[str, Any]) -> list[Problem]:
    problems = [
        Problem(what="not a list", where=name, found=type(document[name]).__name__)
        for name in ("samples", "effects")
        if not isinstance(document.get(name, []), list)
    ]
    if document.get("version", VERSION) != VERSION:
        problems.append(Problem(what="another version", expected=str(VERSION), found=str(document["version"])))
    return problems or [
        Problem(what="text missing", where=f"samples[{i}].{name}")
        for i, sample in enumerate(document.get("samples", []))
        for name in _TEXTS
        if not isinstance(sample.get(name), str)
    ]
