"""Everything that a GGUF file says about its computation is applied or refused by name.

The oracle is the model that the file was written from: its own configuration and weights, run by
transformers. Files are written here key by key, as llama.cpp's converter does.
"""

from __future__ import annotations

import json
import math
import re
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
    model: Any,
    path: Path,
    architecture: str,
    keys: Keys,
    extra: Keys | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The model as llama.cpp's converter writes it, with `keys` (of the architecture unless they
    name another group) and `extra` tensors. `tensors` take the place of those that the names of
    transformers give."""
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
    for name, value in (tensors or _by_their_names(model, architecture)).items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _by_their_names(model: Any, architecture: str) -> dict[str, np.ndarray]:
    config = model.config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    weights = {name: weight.float().numpy() for name, weight in model.state_dict().items()}
    return {
        name: _as_llama_cpp(weights[hf_name], name, architecture, config)
        for name, hf_name in sorted(names.items())
        if name != "output.weight" or not config.tie_word_embeddings
    }


def _as_llama_cpp(weight: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        n = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        return weight.reshape(n, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if architecture == "bloom" and "attn_qkv" in name:
        by_head = weight.reshape(config.n_head, 3, config.hidden_size // config.n_head, -1)
        return by_head.swapaxes(0, 1).reshape(weight.shape)
    if architecture == "mamba" and ("ssm_conv1d.weight" in name or "ssm_a" in name):
        return weight[:, 0] if "conv1d" in name else -np.exp(weight)
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
    # transformers records the stream before each block, of Mamba after it
    kind = "resid_post" if model.config.model_type == "mamba" else "resid_pre"
    sites = [site for site in read.sites() if site.kind == kind]
    found = read.activations(IDS, sites)
    n = len(sites) - (kind == "resid_post")  # the last of Mamba's is after the final norm
    pairs = [(found[site], expected.hidden_states[site.layer]) for site in sites[:n]]
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


def _bloom() -> tuple[Any, Keys, Keys]:
    """Six heads: its reordering of queries, keys and values is no transposition of a square."""
    shape = {"hidden_size": 48, "n_head": 6, "num_attention_heads": 6, "n_layer": 3}
    model = made("bloom", layer_norm_epsilon=1e-3, **shape)
    return model, {"attention.layer_norm_epsilon": 1e-3, "feed_forward_length": 192}, {}


def _falcon() -> tuple[Any, Keys, Keys]:
    """One key/value head, as Falcon 7B has."""
    model = made(
        "falcon",
        multi_query=True,
        new_decoder_architecture=False,
        layer_norm_epsilon=1e-3,
        bias=False,
        rope_parameters={"rope_theta": 777.0},
    )
    keys = {
        "feed_forward_length": 128,
        "attention.head_count_kv": 1,
        "attention.layer_norm_epsilon": 1e-3,
        "rope.freq_base": 777.0,
    }
    return model, keys, {}


def _mamba() -> tuple[Any, Keys, Keys]:
    shape = {"conv_kernel": 3, "state_size": 5, "time_step_rank": 4, "intermediate_size": 64}
    model = made("mamba", layer_norm_epsilon=1e-3, expand=2, **shape)
    keys = {
        "attention.head_count": 0,
        "feed_forward_length": 0,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "ssm.conv_kernel": 3,
        "ssm.state_size": 5,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
    }
    return model, keys, {}


def _starcoder2_without_biases() -> tuple[Any, Keys, Keys]:
    model = made(
        "starcoder2", norm_epsilon=1e-3, rope_parameters={"rope_theta": 777.0}, use_bias=False
    )
    return model, _starcoder2()[1], {}


def _qwen3() -> tuple[Any, Keys, Keys]:
    """Heads wider than the stream over their number, each with its norm."""
    model = made("qwen3", head_dim=16, rms_norm_eps=1e-3, rope_parameters={"rope_theta": 777.0})
    wide = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    return model, {**LLAMA_KEYS, **wide, "rope.freq_base": 777.0}, {}


@pytest.mark.parametrize(
    ("architecture", "make"),
    [
        ("bloom", _bloom),
        ("falcon", _falcon),
        ("mamba", _mamba),
        ("starcoder2", _starcoder2_without_biases),
        ("qwen3", _qwen3),
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


Change = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]


def renamed(model: Any, table: Mapping[str, str], change: Change) -> dict[str, np.ndarray]:
    """The model's tensors by names of llama.cpp, and as its converter changes them."""
    table = {r"^model\.embed_tokens": "token_embd", r"^model\.layers": "blk", **table}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for pattern, replacement in {"^lm_head": "output", **table}.items():
            name = re.sub(pattern, replacement, name)
        tensors |= change(name, weight)
    return {name: weight.float().numpy() for name, weight in tensors.items()}


_ATTENTION = {
    r"^model\.norm": "output_norm",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.o_proj": "attn_output",
    r"self_attn\.([qk])_norm": r"attn_\1_norm",
    r"input_layernorm": "attn_norm",
}
_EXPERTS = {
    **_ATTENTION,
    r"post_attention_layernorm": "ffn_norm",
    r"mlp\.gate\.": "ffn_gate_inp.",
    r"mlp\.shared_expert_gate": "ffn_gate_inp_shexp",
    r"mlp\.shared_expert\.(\w+)_proj": r"ffn_\1_shexp",
    r"mlp\.experts\.down_proj": "ffn_down_exps.weight",
}


def _experts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if name.endswith("gate_up_proj"):
        gate, up = weight.chunk(2, dim=1)
        block = name.split(".mlp")[0]
        return {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
    return {name: weight[0] if "ffn_gate_inp_shexp" in name else weight}


@pytest.mark.parametrize(
    ("architecture", "norm"), [("qwen2moe", False), ("qwen2moe", True), ("qwen3moe", True)]
)
def test_experts(tmp_path: Path, architecture: str, norm: bool) -> None:
    """Stacked experts, a shared one, and whether the weights of those used add up to one: llama.cpp
    always divides in Qwen 3."""
    is_2 = architecture == "qwen2moe"
    model = made(
        "qwen2_moe" if is_2 else "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=norm,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_theta": 777.0},
        **({"shared_expert_intermediate_size": 24} if is_2 else {"head_dim": 8}),
    )
    keys = {
        **LLAMA_KEYS,
        "rope.freq_base": 777.0,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 16,
        **({"expert_shared_feed_forward_length": 24} if is_2 else {"attention.key_length": 8}),
        **({"expert_weights_norm": True} if is_2 and norm else {}),
    }
    tensors = renamed(model, _EXPERTS, _experts)
    path = written(model, tmp_path / "e.gguf", architecture, keys, tensors=tensors)
    assert worst_error(model, path) < 1e-4


def _lfm2() -> tuple[Any, Keys, dict[str, np.ndarray]]:
    model = made(
        "lfm2",
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
    )
    keys = {
        "attention.head_count_kv": [0, 2, 0],
        "attention.layer_norm_rms_epsilon": 1e-3,
        "rope.freq_base": 777.0,
        "shortconv.l_cache": 3,
    }
    names = {
        **_ATTENTION,
        r"^model\.embedding_norm": "token_embd_norm",
        r"operator_norm": "attn_norm",
        r"self_attn\.out_proj": "attn_output",
        r"self_attn\.([qk])_layernorm": r"attn_\1_norm",
        r"feed_forward\.w1": "ffn_gate",
        r"feed_forward\.w2": "ffn_down",
        r"feed_forward\.w3": "ffn_up",
        r"\.conv\.(in_proj|out_proj|conv)\.": r".shortconv.\1.",
    }
    return (
        model,
        keys,
        renamed(model, names, lambda n, w: {n: w[:, 0] if "shortconv.conv" in n else w}),
    )


def _qwen35() -> tuple[Any, Keys, dict[str, np.ndarray]]:
    """Linear attention with four value heads for two of keys, which llama.cpp tiles."""
    n_keys, n_values, width = 2, 4, 8
    model = made(
        "qwen3_5_text",
        num_hidden_layers=4,
        full_attention_interval=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=width,
        linear_num_key_heads=n_keys,
        linear_num_value_heads=n_values,
        linear_value_head_dim=width,
        head_dim=16,
        rms_norm_eps=1e-3,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 777.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    )
    keys = {
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-3,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 777.0,
        "rope.dimension_count": 8,
        "rope.dimension_sections": [2, 1, 1, 0],
        "full_attention_interval": 4,
        "ssm.conv_kernel": 4,
        "ssm.state_size": width,
        "ssm.group_count": n_keys,
        "ssm.time_step_rank": n_values,
        "ssm.inner_size": n_values * width,
    }
    names = {
        **_ATTENTION,
        r"post_attention_layernorm": "post_attention_norm",
        r"mlp\.(\w+)_proj": r"ffn_\1",
        r"linear_attn\.in_proj_qkv": "attn_qkv",
        r"linear_attn\.in_proj_z": "attn_gate",
        r"linear_attn\.in_proj_a": "ssm_alpha",
        r"linear_attn\.in_proj_b": "ssm_beta",
        r"linear_attn\.(conv1d|norm)": r"ssm_\1",
        r"linear_attn\.out_proj": "ssm_out",
        r"linear_attn\.A_log": "ssm_a",
        r"linear_attn\.dt_bias": "ssm_dt.bias",
    }

    def tiled(weight: torch.Tensor, per_head: int) -> torch.Tensor:
        by_head = weight.reshape(n_keys, n_values // n_keys, per_head, -1)
        return by_head.transpose(0, 1).reshape(weight.shape)

    def change(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        n_queries = 2 * width * n_keys
        if name.endswith("norm.weight") and "ssm_norm" not in name:
            weight = weight + 1
        elif name.endswith(("ssm_a", "ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight")):
            weight = tiled(-weight.exp() if name.endswith("ssm_a") else weight, 1)
        elif "attn_gate" in name:
            weight = tiled(weight, width)
        elif "attn_qkv" in name or "conv1d" in name:
            weight = weight[:, 0] if "conv1d" in name else weight
            weight = torch.cat([weight[:n_queries], tiled(weight[n_queries:], width)])
        elif "ssm_out" in name:
            weight = tiled(weight.T.contiguous(), width).T
        return {name: weight}

    return model, keys, renamed(model, names, change)


@pytest.mark.parametrize(("architecture", "make"), [("lfm2", _lfm2), ("qwen35", _qwen35)])
def test_architectures_whose_configuration_transformers_rebuilds(
    tmp_path: Path, architecture: str, make: Callable[[], tuple[Any, Keys, dict[str, np.ndarray]]]
) -> None:
    """They are right, and what transformers does not ask the file for is refused."""
    model, keys, tensors = make()
    path = written(model, tmp_path / "m.gguf", architecture, keys, tensors=tensors)
    assert worst_error(model, path) < 1e-4
    keys = {**keys, "something.new": 3, "attention.scale": 0.7}
    factors = {"rope_freqs.weight": [1.0, 2.0]}
    path = written(model, tmp_path / "r.gguf", architecture, keys, factors, tensors)
    with pytest.raises(UserError) as error:
        LanguageModel.open(Gguf(path=path))
    named = {problem.where for problem in error.value.problems}
    assert named == {"something.new", "attention.scale", "rope_freqs.weight"}


@pytest.mark.parametrize("architecture", ["gpt-oss", "gemma4", "recurrentgemma", "deci", "t5"])
def test_architectures_that_are_read_wrong_or_not_at_all_are_named(
    tmp_path: Path, architecture: str
) -> None:
    """transformers 5.23 names gpt-oss and Gemma 4 among its own, and gives them no experts, or one
    width for heads of two."""
    tensors = _by_their_names(made("llama"), "llama")
    path = written(made("llama"), tmp_path / "x.gguf", architecture, LLAMA_KEYS, tensors=tensors)
    with pytest.raises(
        UserError, match=f"of the architecture {architecture} are not read"
    ) as error:
        LanguageModel.open(Gguf(path=path))
    assert "folder" in str(error.value.fix)


def test_falcon_with_several_key_heads_is_refused(tmp_path: Path) -> None:
    """llama.cpp writes all queries, then all keys; transformers reads them group by group."""
    model, keys, _ = _falcon()
    path = written(model, tmp_path / "f.gguf", "falcon", {**keys, "attention.head_count_kv": 2})
    with pytest.raises(UserError, match="head_count_kv"):
        LanguageModel.open(Gguf(path=path))


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
