"""From a ModelSpec to a Hugging Face module and its tokenizer, read from local files, with nothing
unpickled.

1. A spec is turned into a folder with config.json, *.safetensors and tokenizer files: a packaged
   model and a GGUF file are converted once into the cache, a Hub id is found or downloaded by the
   Hub's own client, a TransformerLens name is looked up for its Hub id. `Random` needs no folder.
2. `load_folder` reads the folder: safetensors only, no code from the folder is run, fused attention
   except where the model caps its attention logits (Gemma 2), which that kernel leaves out without
   a word.

Cost: reading 270 MB of bf16 weights takes 2–3 s; a first conversion of SmolLM2 about 25 s of one
core.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data.cache import hub_snapshot
from data.model.gguf_conversion import converted_gguf
from data.model.loading import check_complete, quiet_transformers
from data.model.spec import (
    Folder,
    Gguf,
    HuggingFace,
    ModelSpec,
    OfWorld,
    Packaged,
    Random,
    TransformerLens,
)
from data.packaged import packaged_model_file
from data.text.bundled import bundled_records
from data.text.tokenizer import Tokenizer, byte_level_tokenizer
from data.worlds.weights import model_of, word_tokenizer
from featureflow.errors import UserError
from featureflow.files import is_lfs_pointer, lfs_problem
from featureflow.progress import Progress
from sae.kernels.select import has_fast_bfloat16

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """`folder` is None for a model made in memory."""

    hf: PreTrainedModel
    tokenizer: Tokenizer
    folder: Path | None


def load_model(spec: ModelSpec, *, dtype: str, device: str, progress: Progress) -> LoadedModel:
    """Raises UserError for an unknown model, missing files, an architecture without support."""
    torch_dtype = parse_dtype(dtype_for(device) if dtype == "auto" else dtype)
    if isinstance(spec, Random | OfWorld):
        loaded = build_random(spec) if isinstance(spec, Random) else build_world(spec)
        _cast_weights(loaded.hf, torch_dtype)
    else:
        folder = folder_of(spec, progress)
        progress("load model", 0, 1)
        loaded = load_folder(folder, torch_dtype)
        progress("load model", 1, 1)
    module: nn.Module = loaded.hf
    module.to(device=_checked_device(device)).eval().requires_grad_(False)
    return loaded


@cache
def dtype_for(device: str) -> str:
    """The dtype in which models run fastest on a device without losing the range of float32:
    bfloat16 where its products are fast, else float32. On a CPU without AVX512-BF16 or AMX bfloat16
    is several times slower than float32. Where a CPU says that it has them, two products are timed
    (20 ms), because oneDNN may be told to leave them alone."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "bfloat16"  # the workers of a cluster have the GPUs
    if not has_fast_bfloat16(device):
        return "float32"
    if device.startswith("cuda"):
        return "bfloat16"
    return "bfloat16" if _seconds(torch.bfloat16) < _seconds(torch.float32) else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """Processor time of a product of the shape of an MLP in one thread, the best of a few: what
    else the machine does must not choose the dtype."""
    x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    n_threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(1)  # threads that wait for each other burn time too
    for _ in range(5):
        started = time.thread_time()
        nn.functional.linear(x, weight)
        taken.append(time.thread_time() - started)
    torch.set_num_threads(n_threads)
    return min(taken)


def parse_dtype(dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise UserError(
            "unknown dtype for the model", found=repr(dtype), expected=", ".join(["auto", *_DTYPES])
        )
    return _DTYPES[dtype]


def folder_of(spec: ModelSpec, progress: Progress) -> Path:
    """The local folder with the model's files, made or fetched if need be."""
    match spec:
        case Packaged(name=name):
            packaged = packaged_model_file(name)
            return converted_gguf(packaged.path, sha256=packaged.sha256, progress=progress)
        case Gguf(path=path):
            return converted_gguf(Path(path), sha256=None, progress=progress)
        case Folder(path=path):
            return _checked_folder(Path(path))
        case HuggingFace(name=name, revision=revision):
            return _hub_folder(name, revision)
        case TransformerLens(name=name):
            return _hub_folder(hub_id_of(name), "main")
        case Random() | OfWorld():
            raise ValueError("a model made in memory has no folder")


def load_folder(folder: Path, dtype: torch.dtype) -> LoadedModel:
    """The model and tokenizer of a folder as `save_pretrained` leaves it."""
    with quiet_transformers(), _explained(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention_for(config),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    hf, loading = loaded
    check_complete(folder, loading)
    return LoadedModel(hf=hf, tokenizer=Tokenizer(tokenizer), folder=folder)


def write_random_like(loaded: LoadedModel, folder: Path, *, seed: int) -> None:
    """A folder with a model of the same config and random weights, as its library initialises
    them, and the same tokenizer. Raises ValueError for a model that was made in memory."""
    from transformers import AutoModelForCausalLM

    if loaded.folder is None:
        raise ValueError("a model made in memory has no tokenizer's files")
    if (folder / "config.json").is_file():
        return
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(loaded.hf.config, dtype=torch.float32)
    partial = folder.with_name(f"{folder.name}.partial")
    made.save_pretrained(partial)
    for file in loaded.folder.iterdir():
        if file.is_file() and not (partial / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, partial / file.name)
    partial.rename(folder)


def attention_for(config: Any) -> str | None:
    """The library's choice (the fused kernel where the architecture has it), but not where
    attention logits are capped: the fused kernel would leave the cap out."""
    text_config = config.get_text_config()
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) else None


def build_random(spec: Random) -> LoadedModel:
    """A Llama of the spec's shape. Weights are drawn in the order of their names from a generator
    of their own."""
    tokenizer = byte_level_tokenizer(spec.d_vocab, (record["text"] for record in bundled_records()))
    config = transformers.LlamaConfig(
        vocab_size=spec.d_vocab,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_mlp,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_heads,
        max_position_embeddings=spec.n_context,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.bos_id,
    )
    with torch.device("meta"):
        hf = transformers.LlamaForCausalLM(config)
    hf = hf.to_empty(device="cpu")
    hf.model.rotary_emb = type(hf.model.rotary_emb)(
        config
    )  # its frequencies are computed, not weights
    _draw_weights(hf, spec)
    return LoadedModel(hf=hf, tokenizer=tokenizer, folder=None)


def build_world(spec: OfWorld) -> LoadedModel:
    """The model of a world, and a tokenizer of its words."""
    tokenizer = Tokenizer(word_tokenizer(spec.world.words))
    return LoadedModel(hf=model_of(spec.world, spec.weights), tokenizer=tokenizer, folder=None)


def _cast_weights(hf: nn.Module, dtype: torch.dtype) -> None:
    """Weights only, as `from_pretrained` does: buffers such as the rotary frequencies stay float32.
    `Module.to` rounds those too, and rounded to bfloat16 SmolLM2's turn position 1,000 by up to 1.4
    radians too much or too little."""
    for weight in hf.parameters():
        weight.data = weight.data.to(dtype)


def _draw_weights(hf: nn.Module, spec: Random) -> None:
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, weight in sorted(hf.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                fan_in = 1 if "embed_tokens" in name else weight.shape[1]
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * spec.scale * fan_in**-0.5
                )


def _checked_device(device: str) -> torch.device:
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise UserError(
            "unknown device", found=repr(device), expected="cpu, cuda, cuda:0, mps"
        ) from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here", found=device, fix="use --device cpu")
    return parsed


def _checked_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(
            "there is no such model folder",
            where=str(folder),
            expected="a folder with config.json, *.safetensors and tokenizer files",
        )
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        missing.append("tokenizer.json")
    if pointers := [path for path in sorted(folder.iterdir()) if _is_small_pointer(path)]:
        raise UserError(
            "the folder holds pointers instead of the model's files",
            problems=tuple(lfs_problem(path) for path in pointers),
            fix="git lfs install, then git lfs pull in that repository",
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            "an adapter lies beside the model, which would run without it",
            where=str(folder / "adapter_config.json"),
            fix="merge it (peft: merge_and_unload) and save the model, or move it elsewhere",
        )
    if missing:
        raise UserError(
            "the folder is not a model that can be read",
            where=str(folder),
            expected=", ".join(missing),
            found=", ".join(sorted(path.name for path in folder.iterdir())[:12])
            or "an empty folder",
            fix="save it with save_pretrained(folder, safe_serialization=True), the tokenizer too",
        )
    return folder


def _is_small_pointer(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 1024 and is_lfs_pointer(path)


def hub_id_of(name: str) -> str:
    from transformer_lens.supported_models import DEFAULT_MODEL_ALIASES, get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError as error:
        near = (
            get_close_matches(name, DEFAULT_MODEL_ALIASES, n=6, cutoff=0.3)
            or DEFAULT_MODEL_ALIASES[:6]
        )
        raise UserError(
            f"TransformerLens knows no model {name!r}",
            expected=f"one of its names, for example {', '.join(near)}",
        ) from error


def commit_of_model(name: str, revision: str) -> str:
    """The commit of what lies in the Hub's local cache; empty where nothing does."""
    folder = hub_snapshot(name, revision)
    return "" if folder is None else folder.name


def _hub_folder(name: str, revision: str) -> Path:
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
    try:
        with quiet_transformers():
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
    except Exception as error:
        raise UserError(
            f"the model {name!r} is neither in the Hub's local cache nor could be fetched",
            expected=f"revision {revision!r} of a public model, or one whose terms you have "
            "accepted",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check the name and the network; offline, use "
            'kind = "packaged" (smollm2-135m), "folder" or "gguf"',
        ) from error
    return _checked_folder(Path(folder))


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Whatever the loader raises about these files becomes one error that names the folder."""
    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # config, tokenizer, safetensors and torch each have errors of their own
        raise UserError(
            "the model in this folder cannot be loaded",
            where=str(folder),
            expected="a causal language model known to transformers, weights as safetensors",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
        ) from error
