"""Files of one encoder and one decoder of which little is said: Goodfire, Qwen Scope, hook_z.

| format | file | tensors | z |
|---|---|---|---|
| goodfire | one `.pt` or `.pth` | {encoder,decoder}_linear.{weight,bias} | relu(pre) |
| qwen_scope | `layer{i}.sae.pt` | W_enc [latent, d], W_dec [d, latent], b | topk(pre) |
| hook_z | one `.pt`, `<name>_cfg.json` | W_enc [d, latent], W_dec [latent, d], b | relu(pre) |

`pre = W_enc x + b_enc`; only hook_z (Kissane and others, attention's z with the heads one after
another) subtracts `b_dec` from x. Qwen Scope's k stands in `config.json`, else in the name of its
folder (`…-W32K-L0_50`). Layouts as SAELens 6.54.12 reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from featureflow.errors import UserError
from sae.activations import Relu, TopKActivation
from sae.formats.base import Format, Shapes, config_beside, described, has
from sae.formats.folding import Foreign
from sae.formats.tensors import checked, read_json, read_pt


def read_goodfire(file: Path, variant: str | None = None) -> Foreign:
    found = checked(
        read_pt(file),
        {
            "encoder_linear.weight": ("latent", "d_in"),
            "encoder_linear.bias": ("latent",),
            "decoder_linear.weight": ("d_in", "latent"),
            "decoder_linear.bias": ("d_in",),
        },
        where=file,
        only=True,
    )
    name = re.fullmatch(r"(.+)-SAE-l(\d+)", file.stem)
    return Foreign(
        W_enc=found["encoder_linear.weight"],
        b_enc=found["encoder_linear.bias"],
        W_dec=found["decoder_linear.weight"].T.contiguous(),
        b_dec=found["decoder_linear.bias"],
        activation=Relu(),
        metadata=described(
            "goodfire",
            file,
            writes=f"blocks.{name[2]}.hook_resid_post" if name else None,
            model=name[1] if name else None,
        ),
    )


def read_qwen_scope(file: Path, variant: str | None = None) -> Foreign:
    config = config_beside(file, "config.json", read_json)
    folder = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", str(file.absolute().parent))
    k = config.get("k", int(folder[2]) if folder else None)
    kind = config.get("model_type", "topk_sae")
    if kind != "topk_sae" or not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UserError(
            "not a TopK dictionary with its k",
            where=str(file.parent / "config.json"),
            expected='{"model_type": "topk_sae", "k": 50}, or a folder …-W32K-L0_50',
            found=f"model_type {kind}, k {k}",
        )
    names = (("latent", "d_in"), ("d_in", "latent"), ("latent",), ("d_in",))
    shapes = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), names, strict=True))
    sizes = {name: config[key] for name, key in _SIZES if isinstance(config.get(key), int)}
    found = checked(read_pt(file), shapes, where=file, sizes=sizes, only=True)
    layer = re.search(r"layer(\d+)", file.name)
    hook = str(config.get("hook_point", "resid_post"))
    return Foreign(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"].T.contiguous(),
        b_dec=found["b_dec"],
        activation=TopKActivation(k=k),
        metadata=described(
            "qwen_scope",
            file,
            config,
            writes=f"blocks.{layer[1]}.hook_{hook}" if layer else None,
            model=config.get("base_model") or (f"Qwen/{folder[1]}" if folder else None),
            l0=k,
        ),
    )


def read_hook_z(file: Path, variant: str | None = None) -> Foreign:
    config = config_beside(file, f"{file.stem}_cfg.json", read_json)
    names = (("d_in", "latent"), ("latent", "d_in"), ("latent",), ("d_in",))
    shapes = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), names, strict=True))
    sizes = {
        name: config[key]
        for name, key in (("d_in", "act_size"), ("latent", "dict_size"))
        if isinstance(config.get(key), int)
    }
    found = checked(read_pt(file), shapes, where=file, sizes=sizes, only=True)
    hook = config.get("act_name")
    return Foreign(
        W_enc=found["W_enc"].T.contiguous(),
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        b_in=found["b_dec"],
        activation=Relu(),
        metadata=described(
            "hook_z",
            file,
            {key: value for key, value in config.items() if isinstance(value, (str, int, float))},
            writes=hook if isinstance(hook, str) else None,
            model=config.get("model_name"),
            notes=(_VALUE_BIAS,),
        ),
    )


_VALUE_BIAS = (
    "made with TransformerLens, which may have moved the value biases out of z; "
    "sae check with the model tells by the published L0"
)
_SIZES = (("d_in", "d_model"), ("latent", "d_sae"))
_FOUR = ("W_enc", "W_dec", "b_enc", "b_dec")


def _four(shapes: Shapes, encoder_rows: str) -> bool:
    """Whether there are the four tensors and no threshold, W_enc with these rows."""
    if not set(_FOUR) <= set(shapes) or {"threshold", "k", "group_sizes"} & set(shapes):
        return False
    return shapes["W_enc"][:1] == shapes[encoder_rows][:1]


def _qwen(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return _four(shapes, "b_enc")


def _hook_z(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return _four(shapes, "b_dec") and not _qwen(shapes)


FORMATS = {
    "goodfire": Format(
        read=read_goodfire,
        lone=("*.pt", "*.pth"),
        fits=has("encoder_linear.weight", "decoder_linear.weight"),
    ),
    "qwen_scope": Format(read=read_qwen_scope, lone=("*.pt",), many="layer*.sae.pt", fits=_qwen),
    "hook_z": Format(read=read_hook_z, lone=("*.pt",), fits=_hook_z),
}
