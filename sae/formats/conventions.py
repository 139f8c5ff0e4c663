"""What a dictionary expects of its activations and no file says.

Three things are missing from published files, or stand only in SAELens' table of releases
(6.54.12, from which the numbers below are taken):

1. whether the stream was centred (TransformerLens' `center_writing_weights`, GPT-2);
2. the scale of the activations, for files that say `expected_average_only_in` or are of
   Llama Scope R1;
3. a normalisation of each token.

`settled` fills them in: what the user says comes first, then the table, by the name of the
repository in the path (of a folder, or of the Hub's cache). What stays open is an error for a
scale, and a note for centring.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from annotated_types import Gt
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.settings import Settings
from sae.formats.folding import Foreign
from sae.formats.normalised import ConstantNorm

OPEN = "conventions_open"
"""Key of the metadata: names of what neither the file nor the table nor the user said."""


class Conventions(Settings):
    """What the user says of dictionaries whose files do not."""

    centred: Annotated[
        bool | None,
        Doc("whether the stream was centred, as TransformerLens does with GPT-2 by default"),
    ] = None
    input_scale: Annotated[
        float | None, Gt(0), Doc("what activations were multiplied by before the dictionary")
    ] = None


_CENTRED = (
    "GPT2-Small-SAEs-Reformatted",
    "GPT2-Small-Feature-Splitting-Experiment-Layer-8",
    "gpt2-small-mlp-out-saes",
)
_CONSTANT_NORM = ("Mistral-7B-Residual-Stream-SAEs",)
_SCALES: Mapping[str, str] = {
    "Gemma-2b-Residual-Stream-SAEs": "12: 0.21381938",
    "gpt2-small-mlp-out-saes": """
        1.0493173 2.3693984 1.6411935 1.8958522 1.8167348 1.5502345 1.3237743 1.1042905 0.91237628
        0.69553356 0.36197289 0.28515487
    """,
    "800M-Slimpajama-0-OpenR1-Math-220k": """
        53.529954 37.074572 26.801272 20.258786 16.356203 13.772731 11.802643 10.345622 9.5271122
        8.7228026 8.1873746 7.6814094 7.011471 6.5078518 6.0758308 5.5293295 5.0412577 4.5430603
        4.1360738 3.8186778 3.4997662 3.1148752 2.8586776 2.614362 2.4065933 2.2185541 2.0386288
        1.8664055 1.6914743 1.5303891 1.3378642 1.0963026
    """,
    "400M-Slimpajama-400M-OpenR1-Math-220k": """
        53.97673 36.769958 26.863295 20.473522 16.491434 13.902529 11.959186 10.454685 9.6258498
        8.7054431 8.0884989 7.4495784 6.8014491 6.3317112 5.7028423 5.3180414 4.7963935 4.3335541
        3.9386839 3.5840451 3.412285 2.9930188 2.7548718 2.5281943 2.3268512 2.1010687 1.9361189
        1.778466 1.663505 1.4488532 1.1570088 1.041978
    """,
    "0-Slimpajama-800M-OpenR1-Math-220k": """
        54.308791 36.49473 26.961264 20.522102 16.677335 14.067505 12.034339 10.495663 9.6830042
        8.6797305 7.988384 7.2375311 6.6944489 6.0489858 5.493593 4.9708605 4.5418879 4.1112929
        3.7319009 3.4464218 3.1614163 2.8600261 2.6361572 2.4287398 2.2405979 2.0346591 1.8430055
        1.6554423 1.4770704 1.3361543 1.1387454 0.92639575
    """,
}
"""By repository or its folder: the scales of layers 0, 1, …, or of the layers named."""


def settled(foreign: Foreign, path: Path, conventions: Conventions) -> Foreign:
    """`foreign` with nothing open but what has a default. Raises UserError for a scale that nobody
    knows."""
    parts = _names_in(path)
    changes: dict[str, object] = {}
    if foreign.input_scale is None:
        changes["input_scale"] = conventions.input_scale or _scale_of(parts)
        changes["output_scale"] = changes["input_scale"]
        if changes["input_scale"] is None:
            raise _no_scale(path)
    elif conventions.input_scale is not None:
        raise UserError(
            "the file says its scale itself",
            where=str(path),
            expected="no input_scale",
            found=f"{conventions.input_scale}, and {foreign.input_scale:g} in the file",
            fix="leave out input_scale",
        )
    if parts & set(_CONSTANT_NORM):
        changes["normalisation"] = ConstantNorm()
    centred = foreign.centred
    if conventions.centred is not None:
        centred = conventions.centred
    elif parts & set(_CENTRED):
        centred = True
    metadata = dict(foreign.metadata)
    if centred is None:
        note = "the file does not say whether the stream was centred; read as not centred"
        metadata = {**metadata, "notes": [*metadata.get("notes", ()), note], OPEN: ["centred"]}
    elif centred:
        metadata["conventions"] = {"centred": True}
    return replace(foreign, **changes, centred=bool(centred), metadata=metadata)  # type: ignore[arg-type]


def _names_in(path: Path) -> set[str]:
    """The names in a path; of the Hub's cache (`models--org--name`) that of the repository."""
    return {part.rpartition("--")[2] for part in path.absolute().parts}


def _scale_of(parts: set[str]) -> float | None:
    text = next((_SCALES[name] for name in _SCALES if name in parts), None)
    layer = next((int(m[1] or m[2]) for part in sorted(parts) if (m := _LAYER.search(part))), None)
    if text is None or layer is None:
        return None
    if ":" in text:
        return {int(a): float(b) for a, b in [text.split(":")]}.get(layer)
    scales = text.split()
    return float(scales[layer]) if layer < len(scales) else None


_LAYER = re.compile(r"blocks\.(\d+)\.hook|^L(\d+)R$")


def _no_scale(path: Path) -> UserError:
    return UserError(
        "the scale of the activations is not in the folder",
        where=str(path),
        expected="activation_scaler.json, normalize_activations: none, or input_scale",
        fix="say input_scale (train.imported.input_scale, or sae check --input-scale): √d / mean "
        "norm of the activations it was trained on",
    )
