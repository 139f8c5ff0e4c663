"""A GGUF file turned, once, into a folder of safetensors and tokenizer files in the cache.

1. The file is named by its sha256 (checked where it is known); an existing folder of that name is
   the answer.
2. The configuration gets every key and every factor that the file states (`data.model.gguf_keys`);
   what cannot be applied is refused by name, and so are tensors that no weight takes.
3. transformers dequantises the tensors to float32 and undoes llama.cpp's permutation of Q and K.
4. Marks of quantisation are dropped from the config (the saved folder would still claim it).
   Quantised weights are saved as bfloat16: the rounding is a hundred times smaller than that of
   4-bit weights, and the folder half the size. Unquantised ones stay float32.
5. Steps of the tokenizer that reading the GGUF loses are put back: digits one by one (SmolLM,
   StarCoder), no space before the text. A way of splitting text that is not known is refused.

Cost for SmolLM2-135M-Instruct: about 25 s of one core, 2 GB of memory, 270 MB of disk.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from gguf import GGMLQuantizationType as Kind
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf import is_gguf_arch_supported
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from data.cache import cache_folder, make_once, sha256_of
from data.model.gguf_keys import ARCHITECTURES, is_rope_factor, stated_config
from data.model.loading import check_complete, quiet_transformers
from featureflow.errors import UserError
from featureflow.files import is_lfs_pointer, lfs_problem
from featureflow.progress import Progress

_OTHER_SOURCE = 'use the model\'s own folder or Hub id: kind = "folder" or "huggingface"'
CONVERSION = 2  # part of the folder's name: raise it when the steps below change


def converted_gguf(path: Path, *, sha256: str | None, progress: Progress) -> Path:
    """The folder for this file. Raises UserError if the file is missing, is not GGUF or has another
    checksum."""
    _check_is_gguf(path)
    found = sha256_of(path)
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
    if is_lfs_pointer(path):
        raise UserError("this is no model yet", problems=(lfs_problem(path),), fix="git lfs pull")
    if magic != b"GGUF":
        raise UserError(
            "not a GGUF file",
            where=str(path),
            expected="the file starts with GGUF",
            found=repr(magic),
        )


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    label = f"convert {path.name}"
    progress(label, 0, 3)
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with (
            quiet_transformers(),
            redirect_stderr(io.StringIO()),
        ):  # the GGUF reader draws a bar of its own
            reader = GGUFReader(path)
            _refuse_other_kinds(path, reader)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
            _restore_steps(tokenizer, reader)
            config = _config_of(path, reader, AutoConfig.from_pretrained(path.parent, **source))
            progress(label, 1, 3)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                **source,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            model, loading = loaded
            check_complete(path, loading)
            _refuse_unused_tensors(path, reader, model)
            progress(label, 2, 3)
            _forget_quantisation(model)
            model.to(_dtype_to_keep(reader)).save_pretrained(folder, safe_serialization=True)
            tokenizer.save_pretrained(folder)
    except UserError:
        raise
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


def _refuse_other_kinds(path: Path, reader: Any) -> None:
    """Files that hold a part of a model, or none."""
    architecture = str(_field(reader, "general.architecture"))
    kind = _field(reader, "general.type") or "model"
    n_parts = int(_field(reader, "split.count") or 1)
    if kind != "model":
        raise UserError("this GGUF file is no model", where=str(path), found=str(kind))
    if n_parts > 1:
        raise UserError(
            "this GGUF file is one part of a model",
            where=str(path),
            found=f"{n_parts} parts",
            fix="join them with llama-gguf-split --merge, or give the model's own folder",
        )
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"GGUF files of the architecture {architecture} are not read here",
            where=str(path),
            expected=", ".join(sorted(ARCHITECTURES)),
            fix=_OTHER_SOURCE,
        )


def _config_of(path: Path, reader: Any, config: Any) -> Any:
    """The configuration with all that the file states. Raises UserError naming what it cannot
    hold."""
    architecture = str(_field(reader, "general.architecture"))
    prefix = f"{architecture}."
    stated = {
        key.removeprefix(prefix): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(prefix)
    }
    tensors = {
        tensor.name: lambda tensor=tensor: (
            dequantize(tensor.data, tensor.tensor_type).reshape(-1).tolist()
        )
        for tensor in reader.tensors
    }
    config, problems = stated_config(config, architecture, stated, tensors)
    embedding = next((each for each in reader.tensors if each.name == "token_embd.weight"), None)
    if embedding is not None:
        config.vocab_size = int(embedding.shape[1])
        if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
            config.pad_token_id = None
    if problems:
        raise UserError(
            f"{path.name} states what cannot be applied: its activations would be another model's",
            problems=tuple(problems),
            fix=_OTHER_SOURCE,
        )
    return config


def _refuse_unused_tensors(path: Path, reader: Any, model: Any) -> None:
    """Tensors of the file that became no weight: biases, norms or experts that the architecture in
    transformers does not have."""
    architecture = str(_field(reader, "general.architecture"))
    known = {name: each for each, name in MODEL_ARCH_NAMES.items()}
    if is_gguf_arch_supported(architecture) or architecture not in known:
        return  # its loader reports unexpected tensors itself
    names = get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    used: dict[str, str] = {"output.weight": "lm_head.weight"}
    for full_name in model.state_dict():
        for name in (full_name, full_name.removeprefix(f"{model.base_model_prefix}.")):
            name = processor.preprocess_name(name)
            stem, dot, suffix = name.rpartition(".")
            if suffix not in ("weight", "bias"):
                stem, dot, suffix = name, "", ""
            found = names.get_name(stem)
            if found is None:
                processor.perform_fallback_tensor_mapping(used, dot + suffix, "", name)
            else:
                used[found + dot + suffix] = name
    is_used = set(used) | {f"{name}.weight" for name in used}
    unused = [
        each.name
        for each in reader.tensors
        if each.name not in is_used and not is_rope_factor(each.name)
    ]
    if unused:
        raise UserError(
            f"{path.name} has tensors that transformers' {type(model).__name__} does not use",
            found=", ".join(unused[:12]) + (" …" if len(unused) > 12 else ""),
            fix=_OTHER_SOURCE,
        )


def _dtype_to_keep(reader: Any) -> torch.dtype:
    """bfloat16 for quantised weights, float32 when the file's matrices are not quantised."""
    wide = {Kind.F32, Kind.F16, Kind.F64}
    is_wide = [each.tensor_type in wide for each in reader.tensors if len(each.shape) > 1]
    return torch.float32 if any(is_wide) else torch.bfloat16


def _forget_quantisation(model: Any) -> None:
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)


_AS_GPT2 = {"default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "phi-2", "mellum"}
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def _restore_steps(tokenizer: Any, reader: Any) -> None:
    """How the file says that text is split, where transformers' reader leaves it out."""
    kind, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if kind == "llama" and _field(reader, "tokenizer.ggml.add_space_prefix") is False:
        _add_no_space(tokenizer.backend_tokenizer)
    if kind != "gpt2":
        return
    if pre in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre is not None and pre not in {*_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS}:
        raise UserError(
            "this GGUF file splits text in a way that is not known here",
            where="tokenizer.ggml.pre",
            found=str(pre),
            expected=", ".join(sorted({*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_FIRST, *_AS_GPT2})),
            fix=_OTHER_SOURCE,
        )


def _add_no_space(backend: Any) -> None:
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
    elif isinstance(backend.normalizer, normalizers.Sequence):
        backend.normalizer = normalizers.Replace(pattern=" ", content="▁")


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
