"""Everything that a GGUF file says about its computation is applied or refused by name.

The oracle is the model that the file was written from: its own configuration and weights, run by
transformers. Files are written here key by key, as llama.cpp's converter does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from data.model.gguf_keys import stated_config
from data.model.language_model import Gguf, LanguageModel
from data.text.bundled import bundled_records
from data.text.tokenizer import byte_level_tokenizer
from featureflow.errors import UserError

TOKENIZER = byte_level_tokenizer(320, [record["text"] for record in bundled_records()])
IDS = torch.randint(1, 300, (2, 120), generator=torch.Generator().manual_seed(3))
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
Keys = Mapping[str, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATUREFLOW_CACHE", str(tmp_path / "cache"))


def made(model_type: str, **options: Any) -> Any:
    """A small model of that kind; weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape) * (0.4 if weight.ndim > 1 else 0.1)
            is_gain = "norm" in name or ".ln_" in name
            weight.copy_(weight + noise if is_gain else noise)
    return model


def written(
    model: Any, path: Path, architecture: str, keys: Keys, extra: Keys | None = None
) -> Path:
    """The model as llama.cpp's converter writes it, with `keys` (of the architecture unless they
    name another group) and `extra` tensors."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    usual = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 128),
        "attention.head_count": config.num_attention_heads,
    }
    for key, value in {**usual, **keys}.items():
        group = "" if key.startswith(("general.", "split.", "tokenizer.")) else f"{architecture}."
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(f"{group}{key}", value) if not isinstance(
            value, list
        ) else writer.add_array(f"{group}{key}", value)
    if "tokenizer.ggml.pre" not in keys:
        writer.add_tokenizer_pre("gpt-2")
    _add_tokenizer(writer)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    weights = model.state_dict()
    for name, hf_name in sorted(names.items()):
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        value = _as_llama_cpp(weights[hf_name].float().numpy(), name, architecture, config)
        writer.add_tensor(name, np.ascontiguousarray(value))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp(weight: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        n = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return weight.reshape(n, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if architecture in ("gemma2", "gemma3", "nemotron") and "norm.weight" in name:
        return weight + 1
    is_transposed = any(part in name for part in ("attn_qkv.w", "ffn_", "attn_output.w"))
    return weight.T if architecture == "gpt2" and is_transposed and weight.ndim == 2 else weight


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    described = json.loads(TOKENIZER.hf.backend_tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def worst_error(model: Any, path: Path) -> float:
    """The largest relative error at a residual site, and of the logits."""
    read = LanguageModel.open(Gguf(path=path), dtype="float32")
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True)
    sites = [site for site in read.sites() if site.kind == "resid_pre"]
    found = read.activations(IDS, sites)
    pairs = [(found[site], expected.hidden_states[site.layer]) for site in sites]
    pairs.append((read.logits(IDS), expected.logits))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def llama3_divisors(width: int, base: float, scaling: Keys) -> list[float]:
    """As llama.cpp's converter computes `rope_freqs.weight`."""
    original = scaling["original_max_position_embeddings"]
    low, high = original / scaling["low_freq_factor"], original / scaling["high_freq_factor"]
    divisors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (i / width)
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return divisors


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_KEYS = {
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-3,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": 8,
    "vocab_size": 320,
}


def test_llama3_factors_are_applied(tmp_path: Path) -> None:
    """`rope_freqs.weight` dropped gives an error of 0.5."""
    model = made("llama", rms_norm_eps=1e-3, rope_parameters=dict(LLAMA3))
    extra = {"rope_freqs.weight": llama3_divisors(8, 5000.0, LLAMA3)}
    path = written(model, tmp_path / "l.gguf", "llama", LLAMA_KEYS, extra)
    assert worst_error(model, path) < 1e-5


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        (
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
        ),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.finetuned": True}),
    ],
)
def test_rotary_scaling_keys_are_applied(tmp_path: Path, rope: Keys, keys: Keys) -> None:
    model = made("llama", rms_norm_eps=1e-3, rope_parameters={**rope, "rope_theta": 5000.0})
    path = written(model, tmp_path / "s.gguf", "llama", {**LLAMA_KEYS, **keys})
    assert worst_error(model, path) < 1e-5


def _qwen2() -> tuple[Any, Keys, Keys]:
    model = made("qwen2", rms_norm_eps=1e-3, rope_parameters={"rope_theta": 777.0})
    return model, {**LLAMA_KEYS, "rope.freq_base": 777.0}, {}


def _starcoder2() -> tuple[Any, Keys, Keys]:
    """transformers drops its rotary base."""
    model = made(
        "starcoder2", norm_epsilon=1e-3, rope_parameters={"rope_theta": 777.0}, use_bias=True
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_epsilon": 1e-3,
        "rope.freq_base": 777.0,
    }
    return model, keys, {}


def _stablelm() -> tuple[Any, Keys, Keys]:
    """transformers drops the rotary base and how much of a head is rotated."""
    model = made(
        "stablelm",
        layer_norm_eps=1e-3,
        rope_parameters={"rope_theta": 777.0, "partial_rotary_factor": 0.5},
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_epsilon": 1e-3,
        "rope.freq_base": 777.0,
        "rope.dimension_count": 4,
        "use_parallel_residual": False,
    }
    return model, keys, {}


def _nemotron() -> tuple[Any, Keys, Keys]:
    """Its epsilon is under another key than transformers looks for; its rotary width is dropped."""
    model = made(
        "nemotron",
        norm_eps=1e-2,
        head_dim=8,
        rope_parameters={"rope_theta": 777.0, "partial_rotary_factor": 0.25},
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_epsilon": 1e-2,
        "rope.freq_base": 777.0,
        "rope.dimension_count": 2,
    }
    return model, keys, {}


def _phi3() -> tuple[Any, Keys, Keys]:
    """Two lists of factors, and a window."""
    short, long = [1.0, 1.5, 2.0, 2.5], [1.0, 3.0, 9.0, 27.0]
    model = made(
        "phi3",
        original_max_position_embeddings=64,
        sliding_window=40,
        rms_norm_eps=1e-3,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 777.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": 64,
        },
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "attention.sliding_window": 40,
        "rope.freq_base": 777.0,
        "rope.dimension_count": 8,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(128 / 64) / math.log(64)),
    }
    return model, keys, {"rope_factors_long.weight": long, "rope_factors_short.weight": short}


def _gemma2() -> tuple[Any, Keys, Keys]:
    """Caps of logits that are not the library's defaults, and the scale of attention."""
    model = made(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=7.0,
        rope_parameters={"rope_theta": 777.0},
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 7.0,
        "rope.freq_base": 777.0,
    }
    return model, keys, {}


def _gemma3() -> tuple[Any, Keys, Keys]:
    """Linear scaling of the layers with full attention only."""
    local, full = "sliding_attention", "full_attention"
    model = made(
        "gemma3_text",
        num_hidden_layers=3,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=24,
        layer_types=[local, full, local],
        rope_parameters={
            local: {"rope_type": "default", "rope_theta": 333.0},
            full: {"rope_type": "linear", "factor": 8.0, "rope_theta": 777.0},
        },
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 24,
        "attention.sliding_window_pattern": [True, False, True],
        "rope.freq_base": 777.0,
        "rope.freq_base_swa": 333.0,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    return model, keys, {}


def _gpt2() -> tuple[Any, Keys, Keys]:
    model = made("gpt2", n_positions=128, n_inner=96, layer_norm_epsilon=1e-2)
    return model, {"attention.layer_norm_epsilon": 1e-2, "feed_forward_length": 96}, {}


@pytest.mark.parametrize(
    ("architecture", "make"),
    [
        ("qwen2", _qwen2),
        ("starcoder2", _starcoder2),
        ("stablelm", _stablelm),
        ("nemotron", _nemotron),
        ("phi3", _phi3),
        ("gemma2", _gemma2),
        ("gemma3", _gemma3),
        ("gpt2", _gpt2),
    ],
)
def test_every_architecture_is_the_model_it_was_written_from(
    tmp_path: Path, architecture: str, make: Callable[[], tuple[Any, Keys, Keys]]
) -> None:
    model, keys, extra = make()
    path = written(model, tmp_path / "m.gguf", architecture, keys, extra)
    assert worst_error(model, path) < 1e-4


@pytest.mark.parametrize(("n_layers", "expected"), [(46, 8), (26, 16)])
def test_gemma_of_27b_has_the_scale_that_no_key_states(n_layers: int, expected: int) -> None:
    """llama.cpp: 46 layers of Gemma 2 scale by the width over the heads (32 / 4), others by the
    head's width."""
    config = CONFIG_MAPPING["gemma2"](**{**SHAPE, "num_hidden_layers": n_layers})
    stated = {"block_count": n_layers, "attention.key_length": 16}
    found, problems = stated_config(config, "gemma2", stated, {})
    assert not problems
    assert found.query_pre_attn_scalar == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_logit_softcapping": 30.0},
        {"attention.sliding_window": 16},
        {"attention.scale": 0.7},
        {"attention.clamp_kqv": 8.0},
        {"logit_scale": 0.0625},
        {"residual_scale": 0.22},
        {"embedding_scale": 12.0},
        {"expert_count": 8, "expert_used_count": 2},
        {"rope.dimension_count": 4},
        {"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0},
        {"rope.dimension_sections": [2, 2, 0, 0]},
        {"attention.causal": False},
        {"attention.value_length": 4, "attention.key_length": 8},
        {"something.new": 3},
    ],
)
def test_keys_without_a_place_are_refused_by_name(tmp_path: Path, keys: Keys) -> None:
    path = written(made("llama"), tmp_path / "r.gguf", "llama", {**LLAMA_KEYS, **keys})
    with pytest.raises(UserError) as error:
        LanguageModel.open(Gguf(path=path))
    assert any(key in str(error.value) for key in keys)
    assert "folder" in str(error.value.fix)


def test_all_keys_that_cannot_be_applied_are_named_together(tmp_path: Path) -> None:
    keys = {**LLAMA_KEYS, "residual_scale": 0.22, "logit_scale": 16.0}
    path = written(made("llama"), tmp_path / "r.gguf", "llama", keys)
    with pytest.raises(UserError) as error:
        LanguageModel.open(Gguf(path=path))
    assert {problem.where for problem in error.value.problems} == {"residual_scale", "logit_scale"}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"blk.0.attn_q_norm.weight": [1.0] * 8}, "attn_q_norm"),
        ({"blk.1.attn_q.bias": [0.5] * 32}, "attn_q.bias"),
        ({"blk.2.ffn_gate_inp.weight": [[0.1] * 32] * 4}, "ffn_gate_inp"),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path: Path, extra: Keys, named: str) -> None:
    path = written(made("llama"), tmp_path / "t.gguf", "llama", LLAMA_KEYS, extra)
    with pytest.raises(UserError, match="does not use") as error:
        LanguageModel.open(Gguf(path=path))
    assert named in str(error.value)


def test_biases_of_the_attention_are_read(tmp_path: Path) -> None:
    model = made("llama", attention_bias=True, rms_norm_eps=1e-3)
    keys = {**LLAMA_KEYS, "rope.freq_base": 10000.0}
    assert worst_error(model, written(model, tmp_path / "b.gguf", "llama", keys)) < 1e-5


def test_tied_and_separate_unembeddings(tmp_path: Path) -> None:
    keys = {**LLAMA_KEYS, "rope.freq_base": 10000.0}
    for tied in (True, False):
        model = made("llama", tie_word_embeddings=tied, rms_norm_eps=1e-3)
        path = written(model, tmp_path / f"{tied}.gguf", "llama", keys)
        assert worst_error(model, path) < 1e-5


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"split.count": 3}, "3 parts"),
        ({"general.type": "adapter"}, "adapter"),
        ({"tokenizer.ggml.pre": "chameleon"}, "chameleon"),
    ],
)
def test_parts_adapters_and_unknown_splitting_are_refused(
    tmp_path: Path, keys: Keys, named: str
) -> None:
    path = written(made("llama"), tmp_path / "p.gguf", "llama", {**LLAMA_KEYS, **keys})
    with pytest.raises(UserError) as error:
        LanguageModel.open(Gguf(path=path))
    assert named in str(error.value)
