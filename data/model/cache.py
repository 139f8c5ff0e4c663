"""A folder for things made once and kept: converted models. `$FEATUREFLOW_CACHE`, or
`~/.cache/featureflow`.

`make_once` builds a folder beside its place and renames it there, so that a folder that exists is
complete and two processes that build the same one do no harm: the first rename wins and the other's
work is thrown away.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from featureflow.errors import UserError


def cache_folder() -> Path:
    """Where converted models are kept; not created here. Raises UserError without a home."""
    place = os.path.expanduser(os.environ.get("FEATUREFLOW_CACHE") or "~/.cache/featureflow")
    if place.startswith("~"):
        raise UserError(
            "there is no home folder to keep models in",
            where=place,
            fix="set FEATUREFLOW_CACHE to a folder of yours",
        )
    return Path(place)


def make_once(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, built by `build(folder)` if it is not there. A failed build leaves nothing
    behind."""
    if place.is_dir():
        return place
    beside = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.mkdir(parents=True)
        build(beside)
        _rename_unless_there(beside, place)
    except OSError as error:
        raise UserError(
            "cannot write the cache",
            where=str(place),
            found=str(error),
            fix="free disk space, or set FEATUREFLOW_CACHE to a folder that can be written",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place


def _rename_unless_there(beside: Path, place: Path) -> None:
    try:
        beside.rename(place)
    except OSError:
        if not place.is_dir():
            raise
