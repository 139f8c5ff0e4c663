"""Local files that are built before they are uploaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def staging_file(name: str) -> Path:
    """A new temporary file for a place that is not a folder."""
    descriptor, path = tempfile.mkstemp(prefix="featureflow-", suffix="-" + name.rpartition("/")[2])
    os.close(descriptor)
    return Path(path)
