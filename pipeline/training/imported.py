"""Dictionaries that others trained, in place of training: files in any known format → the
dictionaries of a run.

1. `paths` maps a kind of site to a pattern; `{layer}` stands for the layer, `*` for what differs
   from file to file. Every site asked for (`train.sites`, else all of the store) must find exactly
   one file or folder.
2. Each is read by `sae.formats`, which folds scales and thresholds, checked against the width of
   the site, and written in the native form, so that the later stages see no difference.

Cost: reading and writing the tensors once. Sites without a pattern are left out.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from data.store import ActivationStore
from featureflow.errors import Problem, UserError
from featureflow.progress import Progress, silent
from featureflow.settings import Settings
from featureflow.sites import Site
from sae import save_sae
from sae.formats import read

_IDENTITY_BYTES = 1 << 20


class Imported(Settings):
    """Dictionaries that are read instead of trained."""

    paths: Annotated[
        dict[str, str],
        Doc(
            "pattern for each kind of site, e.g. resid_post = "
            "'gemma-scope/layer_{layer}/width_16k/*/params.npz'"
        ),
    ]
    format: Annotated[str, Doc("format of the files; auto recognises it")] = "auto"
    kind: Literal["imported"] = "imported"


def find_imported(choice: Imported, sites: Sequence[Site]) -> dict[Site, Path]:
    """The file or folder of every site whose kind has a pattern. Raises UserError with every site
    that has none or several, and every kind that no site has."""
    found: dict[Site, Path] = {}
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    problems = [
        Problem(
            what="no site of this kind is there",
            where=f"train.imported.paths.{kind}",
            expected=", ".join(kinds),
        )
        for kind in choice.paths
        if kind not in kinds
    ]
    for site in sites:
        if site.kind not in choice.paths:
            continue
        pattern = choice.paths[site.kind].replace("{layer}", str(site.layer))
        matches = sorted(glob.glob(pattern))
        if len(matches) == 1:
            found[site] = Path(matches[0])
        else:
            what = "several dictionaries fit" if matches else "no dictionary fits"
            problems.append(
                Problem(
                    what=what,
                    where=f"{site.short}: {pattern}",
                    found=", ".join(matches[:3]) or None,
                )
            )
    if problems:
        raise UserError(
            "the dictionaries to import cannot be found",
            problems=tuple(problems),
            fix="put the files there, or change train.imported.paths",
        )
    return found


def identity_of_imported(choice: Imported) -> str:
    """A digest that changes with the files: names, sizes, first and last megabyte. Cheap for
    gigabytes."""
    hasher = hashlib.sha256()
    for kind, pattern in sorted(choice.paths.items()):
        for name in sorted(glob.glob(pattern.replace("{layer}", "*"))):
            for path in _files_of(Path(name)):
                size = path.stat().st_size
                hasher.update(f"{kind}:{path.name}:{size}:".encode())
                with path.open("rb") as stream:
                    hasher.update(stream.read(_IDENTITY_BYTES))
                    stream.seek(max(0, size - _IDENTITY_BYTES))
                    hasher.update(stream.read())
    return hasher.hexdigest()


def import_dictionaries(
    choice: Imported,
    store: ActivationStore,
    folder: Path,
    *,
    sites: Sequence[Site] = (),
    progress: Progress = silent,
) -> dict[Site, Mapping[str, Any]]:
    """Read the dictionary of every site (none named: all of the store) and write it to
    `folder/<site>`; returns their metadata by site. Raises UserError."""
    paths = find_imported(choice, sites or store.sites)
    described: dict[Site, Mapping[str, Any]] = {}
    for done, (site, path) in enumerate(paths.items()):
        progress("import dictionaries", done, len(paths))
        sae = read(path, format=choice.format)
        if sae.d_in != store.width(site):
            raise UserError(
                "the dictionary does not fit the site",
                where=f"{site.short}: {path}",
                expected=f"width {store.width(site)}",
                found=f"width {sae.d_in}",
            )
        sae.metadata.update({"site": site.name, "imported_from": path.name})
        save_sae(sae, folder / site.short)
        described[site] = sae.metadata
    progress("import dictionaries", len(paths), len(paths))
    return described


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
