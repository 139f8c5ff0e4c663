"""Later stages hand the atlas something to show: `site/attached/` is the one part of it that may
still change.

The artifact's manifest lists every file, so it is told too: first it forgets the file, then the
file is replaced, then it learns the new size and checksum. Killed at any point, the atlas still
opens. An atlas made again from the same dictionaries takes over what was attached to the one before
(`carry_over`), since ids mean the same features there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featureflow.errors import Command, Problem, UserError
from featureflow.files import write_text_atomically
from pipeline.artifact import MANIFEST, SCHEMAS, Artifact
from pipeline.site.shards import Shard, read_shard, write_shard
from pipeline.site.site_folder import ATTACHED_VERSION, NO_STEERING

STEERING, SCORES = "site/attached/steering.js", "site/attached/scores.js"
_TEXTS = ("feature", "arm", "prompt", "unsteered", "steered")


def attach_steering(atlas_folder: Path | str, document: Mapping[str, Any]) -> None:
    """Let the atlas show steering samples: `attached/steering` of
    docs/decisions/0003-atlas-shards.md. An earlier attachment is replaced. Raises UserError when
    there is no atlas or the document has another form."""
    folder = Path(atlas_folder)
    _check_place(folder)
    problems = _problems_of(document)
    if problems:
        raise UserError("not steering samples", problems=tuple(problems))
    _attach(folder, STEERING, {**NO_STEERING, **document})


def attach_scores(atlas_folder: Path | str, features: Mapping[str, Mapping[str, Any]]) -> None:
    """Let the atlas show what was found out about some features afterwards, by feature id:
    `attached/scores` of docs/decisions/0003-atlas-shards.md. Scores of other features attached
    earlier stay, and of these what is not said anew. Raises UserError when there is no atlas."""
    folder = Path(atlas_folder)
    _check_place(folder)
    known = read_scores(folder)
    merged = {
        **known,
        **{name: {**known.get(name, {}), **found} for name, found in features.items()},
    }
    _attach(folder, SCORES, {"version": ATTACHED_VERSION, "features": dict(sorted(merged.items()))})


def read_scores(atlas_folder: Path | str) -> dict[str, dict[str, Any]]:
    """What `attach_scores` left, by feature id; empty before."""
    folder = Path(atlas_folder)
    if not (folder / SCORES).is_file():
        return {}
    return dict(read_shard(folder / "site", "attached/scores").json["features"])


def carry_over(before: Path, site: Path, *, train: str) -> bool:
    """Take over what was attached to the atlas at `before`, if it was made of the same dictionaries
    (`train`, a digest), into a new `site` folder. Returns whether there was anything."""
    try:
        earlier = Artifact.open(before, kind="atlas", schema=SCHEMAS["atlas"])
    except UserError:  # none, or of another version: nothing that can be relied on
        return False
    carried = [
        name
        for name in (STEERING, SCORES)
        if name in earlier.files and earlier.inputs.get("train") == train
    ]
    for name in carried:
        place = site.parent / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(earlier.file(name), place)
    return bool(carried)


def _attach(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Replace one attached file, the manifest told before and after."""
    _record(folder, name, None)
    beside = folder / "site" / "attached.new"
    made = write_shard(beside, name.removeprefix("site/").removesuffix(".js"), Shard(json=document))
    (folder / name).parent.mkdir(exist_ok=True)
    made.replace(folder / name)
    shutil.rmtree(beside)
    _record(folder, name, folder / name)


def _check_place(folder: Path) -> None:
    if not (folder / "site" / "manifest.json").is_file():
        raise UserError(
            "there is no atlas here",
            where=str(folder),
            expected="site/manifest.json",
            fix=Command("run", to="atlas"),
        )


def _record(folder: Path, name: str, path: Path | None) -> None:
    """Write an attached file's size and checksum into the artifact's manifest, or take them out."""
    manifest = folder / MANIFEST
    if not manifest.is_file():  # a site on its own, without the artifact around it
        return
    document = json.loads(manifest.read_text(encoding="utf-8"))
    document["files"].pop(name, None)
    if path is not None:
        content = path.read_bytes()
        document["files"][name] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    write_text_atomically(manifest, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _problems_of(document: Mapping[str, Any]) -> list[Problem]:
    problems = [
        Problem(what="not a list", where=name, found=type(document[name]).__name__)
        for name in ("samples", "effects")
        if not isinstance(document.get(name, []), list)
    ]
    if document.get("version", ATTACHED_VERSION) != ATTACHED_VERSION:
        problems.append(
            Problem(
                what="another version",
                expected=str(ATTACHED_VERSION),
                found=str(document["version"]),
            )
        )
    return problems or [
        Problem(what="text missing", where=f"samples[{i}].{name}")
        for i, sample in enumerate(document.get("samples", []))
        for name in _TEXTS
        if not isinstance(sample.get(name), str)
    ]
