"""A GGUF file turned, once, into a folder of safetensors and tokenizer files in the cache.

1. The file is named by its sha256 (checked where it is known); an existing folder of that name is
   the answer.
2. transformers dequantises the tensors to float32 and undoes llama.cpp's permutation of Q and K.
3. Marks of quantisation are dropped from the config (the saved folder would still claim it) and the
   weights are saved as bfloat16: the rounding is a hundred times smaller than that of 4-bit
   weights, and the folder half the size.
4. SmolLM's tokenizer splits digits one by one, a step that reading the GGUF loses; it is put back.

Cost for SmolLM2-135M: about 25 s of one core, 2 GB of memory, 270 MB of disk.
"""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from data.model.cache import cache_folder, make_once
from featureflow.errors import UserError
from featureflow.progress import Progress

CONVERSION = 1  # part of the folder's name: raise it when the steps below change


def converted_gguf(path: Path, *, sha256: str | None, progress: Progress) -> Path:
    """The folder for this file. Raises UserError if the file is missing, is not GGUF or has another
    checksum."""
    _check_is_gguf(path)
    found = _sha256(path)
    if sha256 is not None and found != sha256:
        raise UserError(
            "the model file is not the one expected", where=str(path), expected=sha256, found=found
        )
    place = cache_folder() / "models" / f"{path.stem}-{found[:12]}-v{CONVERSION}"
    return make_once(place, lambda folder: _convert(path, folder, progress))


def _check_is_gguf(path: Path) -> None:
    if not path.is_file():
        raise UserError("there is no such model file", where=str(path), expected="a .gguf file")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise UserError(
            "not a GGUF file",
            where=str(path),
            expected="the file starts with GGUF",
            found=repr(magic),
        )


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data.model.sources import quiet_transformers

    label = f"convert {path.name}"
    progress(label, 0, 3)
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with (
            quiet_transformers(),
            redirect_stderr(io.StringIO()),
        ):  # the GGUF reader draws a bar of its own
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
            progress(label, 1, 3)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, **source, dtype=torch.float32
            )
            progress(label, 2, 3)
            _forget_quantisation(model)
            model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
            _restore_digits(tokenizer, path)
            tokenizer.save_pretrained(folder)
    except (
        Exception
    ) as error:  # the reader, the dequantiser and the tokenizer each have errors of their own
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk: explained by make_once
        raise UserError(
            "this GGUF file cannot be converted",
            where=str(path),
            expected="an architecture and quantisation that transformers can read",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        ) from error
    progress(label, 3, 3)


def _forget_quantisation(model: Any) -> None:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)


def _restore_digits(tokenizer: Any, path: Path) -> None:
    """Put back `Digits(individual_digits)` before the byte-level step where the file says
    `smollm`."""
    if _pre_tokenizer_name(path) != "smollm":
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _pre_tokenizer_name(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _sha256(path: Path) -> str:
    """Checksums of large files are remembered by size and time of change."""
    stat = path.stat()
    key = hashlib.sha256(
        f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()
    ).hexdigest()[:32]
    memo = cache_folder() / "checksums" / f"{key}.json"
    try:
        return str(json.loads(memo.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    _remember(memo, found)
    return found


def _remember(memo: Path, found: str) -> None:
    """A cache that cannot be written costs time, not the run."""
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(json.dumps({"sha256": found}))
    except OSError:
        return
