"""What a GGUF file says about its computation, put into the configuration transformers reads from
it.

transformers copies some of the file's keys into the configuration and drops the others without a
word: rotary scaling and the factors in `rope_freqs.weight`, the rotary base of StarCoder 2, partial
rotation, caps of logits, widths of experts. Here every key of the architecture is one of

1. applied: `_ATTRIBUTES` names the field that takes the value, whatever the model calls it; rotary
   keys and factors become `rope_parameters`;
2. without effect: `_INERT`, and values that say "not used" (`_NEUTRAL`);
3. refused by name, all together: anything else.

Factors for each frequency (Llama 3.1 and later) are kept exactly, as `longrope` with one list for
short and long contexts. Sources: llama.cpp's `gguf/constants.py` and the architectures' graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.integrations.gguf.gguf_config_mapping import get_gguf_config

from featureflow.errors import Problem

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": (
        "layer_norm_epsilon",
        "layer_norm_eps",
        "norm_epsilon",
        "norm_eps",
    ),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual", "parallel_attn"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "use_parallel_residual": (False,),
}
_OFF_AT_ZERO = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_INERT = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"})
ARCHITECTURES = frozenset(
    {
        *("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen35", "gemma2", "gemma3"),
        *("phi3", "gpt2", "starcoder2", "stablelm", "nemotron", "falcon", "bloom", "mamba", "lfm2"),
    }
)
"""Files of these, written as llama.cpp's converter does, gave the activations of the model they
were written from (tests/data/test_gguf.py). transformers reads others too, some of them wrong."""
_REBUILT = ("qwen35", "lfm2")
"""transformers makes the configuration of these from the keys itself."""
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_DEFAULT_ROPE = {"rope_type": "default"}


def is_rope_factor(tensor: str) -> bool:
    """Whether a tensor of the file is read here and is no weight of the model."""
    return tensor in _ROPE_FACTORS


def stated_config(
    config: Any, architecture: str, stated: Mapping[str, Any], tensors: Mapping[str, Any]
) -> tuple[Any, list[Problem]]:
    """The configuration with everything that the file states, and what cannot be put into it.

    `stated` are the keys of the architecture without its name; `tensors` map a name to a function
    that reads the values."""
    plain = config.to_dict()
    if architecture in _REBUILT:
        return config, _unread(plain, architecture, stated, tensors)
    left = {key: value for key, value in stated.items() if key not in _INERT}
    problems: list[Problem] = []
    changes: dict[str, Any] = {}
    for key in [key for key in left if not key.startswith("rope.")]:
        value = _scalar(left.pop(key))
        change = _change(key, value, plain, stated)
        if change is None:
            problems.append(_problem(key, value))
        else:
            changes |= change
    if plain["model_type"] in ("llama", "mistral"):  # transformers takes the rotary width for it
        changes.setdefault("head_dim", plain["hidden_size"] // plain["num_attention_heads"])
    changes |= _shape_of_tensors(plain, tensors)
    changes = _hidden_convention(plain | changes) | changes
    if plain.get("rope_parameters"):
        known = plain | changes
        width = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
        rope, unread = _rope_parameters(plain["rope_parameters"], left, tensors, width, stated)
        changes["rope_parameters"] = rope
        problems += [_problem(key, left[key]) for key in unread]
        if "original_max_position_embeddings" in plain:
            original = stated.get("rope.scaling.original_context_length")
            changes["original_max_position_embeddings"] = (
                original or plain["max_position_embeddings"]
            )
    return type(config)(**(_without_derived(plain, changes) | changes)), problems


class _Noting(dict[str, Any]):
    """Notes which keys are asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _unread(
    plain: Mapping[str, Any],
    architecture: str,
    stated: Mapping[str, Any],
    tensors: Mapping[str, Any],
) -> list[Problem]:
    """What the file states and transformers does not ask for, unless the configuration says the
    same."""
    named = {f"{architecture}.{key}": value for key, value in stated.items()}
    keys = _Noting({"general.architecture": architecture, "tokenizer.ggml.tokens": 0, **named})
    get_gguf_config(keys, tuple(tensors))
    left = [key for key in stated if f"{architecture}.{key}" not in keys.read]
    width = plain.get("head_dim") or plain["hidden_size"] // plain["num_attention_heads"]
    same = {"rope.dimension_count": width, "attention.key_length": width}
    problems = []
    for key in left:
        value = _scalar(stated[key])
        change = {} if value == same.get(key) else _change(key, value, plain, stated)
        if key in _INERT or value in _NEUTRAL.get(key, ()):
            continue
        if change is None or any(plain.get(name) != to for name, to in change.items()):
            problems.append(_problem(key, value))
    return problems + [
        Problem(what="not applied by the loader", where=name)
        for name in _ROPE_FACTORS
        if name in tensors
    ]


def _change(
    key: str, value: Any, plain: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The fields that one key sets: none where it has no effect; None where it cannot be said."""
    if key == "attention.sliding_window_pattern":
        return _window_pattern(value, plain, stated)
    if key == "attention.scale":
        return _attention_scale(value, plain, stated)
    if key == "attention.head_count_kv" and plain["model_type"] == "falcon" and value != 1:
        return (
            None  # llama.cpp writes queries, keys and values in another order than one reads them
        )
    if key == "attention.value_length":
        return {} if value == stated.get("attention.key_length", value) else None
    if key == "attention.sliding_window" and value >= stated.get("context_length", np.inf):
        return {"sliding_window": None} if "sliding_window" in plain else {}
    if key == "attention.sliding_window" and plain.get("use_sliding_window") is False and value:
        return None  # at which layers, the file does not say
    name = _attribute(key, plain)
    if key in _OFF_AT_ZERO and not value:
        return {} if name is None else {name: None}
    if value == 0 and key in ("feed_forward_length", "attention.head_count"):
        return {}  # a state-space model has neither
    if name is None and value in _NEUTRAL.get(key, ()):
        return {}
    if name is not None and not isinstance(value, (list, tuple)):
        return {name: value}
    return _computed_alike(key, value, plain, stated)


def _computed_alike(
    key: str, value: Any, plain: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Keys without a field of their own, where the model computes what they say anyway."""
    n_heads = stated.get("attention.head_count") or 1
    width = stated.get("embedding_length") or 0
    same = {
        "context_length": value,  # no positions to learn or to rotate
        "attention.key_length": width // n_heads if isinstance(n_heads, int) else None,
        "attention.head_count_kv": n_heads,
        "feed_forward_length": 4 * width,
    }
    return {} if key in same and same[key] == value else None


def _attribute(key: str, plain: Mapping[str, Any]) -> str | None:
    fields = {*plain, *_ALIASES.get(plain["model_type"], ())}
    return next((name for name in _ATTRIBUTES.get(key, ()) if name in fields), None)


_ALIASES = {
    "gpt2": ("hidden_size", "num_attention_heads", "num_hidden_layers"),
    "bloom": ("num_hidden_layers", "num_attention_heads"),
}


def _window_pattern(
    value: Any, plain: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any] | None:
    if "layer_types" not in plain:
        return None
    n_layers = stated["block_count"]
    is_local = (
        list(value)
        if isinstance(value, (list, tuple))
        else [(layer + 1) % value != 0 for layer in range(n_layers)]
    )
    return {"layer_types": ["sliding_attention" if each else "full_attention" for each in is_local]}


def _attention_scale(
    value: float, plain: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any] | None:
    if "query_pre_attn_scalar" in plain:
        return {"query_pre_attn_scalar": 1 / value**2}
    width = stated.get("attention.key_length") or (
        stated["embedding_length"] // stated["attention.head_count"]
    )
    return {} if np.isclose(value, width**-0.5) else None


def _shape_of_tensors(plain: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says by having a tensor."""
    changes: dict[str, Any] = {}
    if "output.weight" in tensors:
        changes["tie_word_embeddings"] = False
    for name, field in (
        ("attn_q.bias", "attention_bias"),
        ("attn_q.bias", "use_bias"),
        ("ffn_up.bias", "mlp_bias"),
    ):
        if field in plain:
            changes[field] = f"blk.0.{name}" in tensors
    return changes


def _without_derived(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Layer types follow from other fields, unless the file has stated them."""
    is_new = "layer_types" in changes or changes.get("num_hidden_layers") == len(
        plain.get("layer_types") or ()
    )
    return {key: value for key, value in plain.items() if key != "layer_types" or is_new}


def _rope_parameters(
    present: Mapping[str, Any],
    stated: Mapping[str, Any],
    tensors: Mapping[str, Any],
    width: int,
    all_stated: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Rotary parameters as transformers writes them, and the keys that could not be put there.
    Where they differ by the kind of attention, scaling is of the full attention only, as in
    llama.cpp's graph of Gemma 3."""
    nested = "full_attention" in present
    rope = dict(present["full_attention"] if nested else present)
    left = {key.removeprefix("rope."): value for key, value in stated.items()}
    rope["rope_theta"] = left.pop("freq_base", rope["rope_theta"])
    rotated = left.pop("dimension_count", width)
    unread = []
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = rotated / width
    elif rotated != width:
        unread.append("dimension_count")
    rope |= _scaling(left, tensors, all_stated)
    local_base = left.pop("freq_base_swa", None)
    unread += [key for key, value in left.items() if value not in _NEUTRAL.get(f"rope.{key}", ())]
    if nested:
        local = dict(present["sliding_attention"])
        local["rope_theta"] = local_base or local["rope_theta"]
        return {"full_attention": rope, "sliding_attention": local}, [f"rope.{k}" for k in unread]
    if local_base not in (None, rope["rope_theta"]):
        unread.append("freq_base_swa")
    return rope, [f"rope.{key}" for key in unread]


def _scaling(
    left: dict[str, Any], tensors: Mapping[str, Any], stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Takes the keys it applies out of `left`."""
    context = stated.get("context_length", 0)
    kind = left.get("scaling.type", "linear" if "scale_linear" in left else None)
    attention_factor = left.get("scaling.attn_factor", 1.0)
    if factors := _factors(tensors):
        for key in ("type", "original_context_length", "attn_factor"):
            left.pop(f"scaling.{key}", None)
        original = stated.get("rope.scaling.original_context_length") or context
        return {
            "rope_type": "longrope",
            **factors,
            "original_max_position_embeddings": original,
            "attention_factor": float(attention_factor),
        }
    if kind == "linear":
        left.pop("scaling.type", None)
        factor = left.pop("scaling.factor", left.pop("scale_linear", 1.0))
        if attention_factor == 1.0:
            left.pop("scaling.attn_factor", None)
        left.pop("scaling.original_context_length", None)
        return {"rope_type": "linear", "factor": float(factor)} if factor != 1.0 else _DEFAULT_ROPE
    if kind == "yarn" and "scaling.factor" in left:
        del left["scaling.type"]
        factor = float(left.pop("scaling.factor"))
        left.pop("scaling.attn_factor", None)
        original = left.pop("scaling.original_context_length", None) or int(context / factor)
        usual = 0.1 * np.log(factor) + 1 if factor > 1 else 1.0
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": float(attention_factor * usual),
            "beta_fast": float(left.pop("scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(left.pop("scaling.yarn_beta_slow", 1.0)),
        }
    if kind in (None, "none"):
        left.pop("scaling.type", None)
        if left.get("scaling.factor") in (0.0, 1.0):
            del left["scaling.factor"]
        if attention_factor == 1.0:
            left.pop("scaling.attn_factor", None)
        left.pop("scaling.original_context_length", None)
    return {}


def _factors(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    """Divisors of each frequency, for contexts up to the original length and beyond it."""
    if "rope_freqs.weight" in tensors:
        both = tensors["rope_freqs.weight"]()
        return {"short_factor": both, "long_factor": both}
    names = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    if all(name in tensors for name in names.values()):
        return {key: tensors[name]() for key, name in names.items()}
    return {}


def _hidden_convention(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows by the architecture alone and no file states: Gemma 2 and 3 of 27 B
    scale the attention by the width of the stream over the heads, the others by the head's."""
    n_layers = {"gemma2": 46, "gemma3_text": 62}.get(plain["model_type"])
    if n_layers is None:
        return {}
    is_27b = plain["num_hidden_layers"] == n_layers
    scalar = plain["hidden_size"] // plain["num_attention_heads"] if is_27b else plain["head_dim"]
    return {"query_pre_attn_scalar": scalar}


def _scalar(value: Any) -> Any:
    """A list of equal numbers, one a layer, is that number."""
    if isinstance(value, (list, tuple)) and value and len(set(value)) == 1:
        return value[0]
    return value


def _problem(key: str, value: Any) -> Problem:
    return Problem(what="not applied by the loader", where=key, found=str(value)[:80])
