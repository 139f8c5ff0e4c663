"""Edits of an activation: from the vector `h` at a site to the edited vector, one small formula
each.

Edits of a feature read its activation `a = encode(h)` and choose a new one `a'`; the vector becomes

    h' = h + Σ (a'_i − a_i) · d_i                        (d_i: decoder row i)

so what the dictionary does not explain stays, and nothing changes, to the bit, where `a' = a`.
Edits of a direction need no encoder. `s` is the strength of a node (the plan's strength × the
node's weight); `m` is the node's scale, in units of activation. At `s = 0` every edit leaves `h`
alone.

| edit         | formula                                                        |
|--------------|----------------------------------------------------------------|
| Add          | h' = h + s·m·u,  u = d/‖d‖  (`keep_norm`: then × ‖h‖/‖h'‖)      |
| Clamp        | a' = s·m                                                       |
| Floor        | a' = max(a, s·m): adds only what is missing (closed loop)      |
| Cap          | a' = min(a, (1 − s)·m) where a > 0: the twin for suppression   |
| Rescale      | a' = (1 − s)·a, or (1 + s)·a with `amplify`; the paper's r     |
| Ablate       | a' = (1 − min(s, 1))·a                                         |
| MeanAblate   | a' = a + min(s, 1)·(mean − a)                                  |
| ProjectOut   | h' = h − min(s, 1)·((h·u) − mean)·u, several u at once by their pseudo-inverse |
| Rotate       | h' = ‖h‖(cos θ·ĥ + sin θ·u⊥), θ = min(s, 1)·90°                |

Cost: one product with the selected decoder rows a site; the encoder columns only for edits of
features. Sources: AxBench (clamp, min-clamp), Feature Flow (rescale, add), saklas (rotation),
refusal-direction (projection).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from steering.choice import FromFile


class Add(FromFile):
    kind: Literal["add"] = "add"
    keep_norm: bool = False


class Clamp(FromFile):
    kind: Literal["clamp"] = "clamp"


class Floor(FromFile):
    kind: Literal["floor"] = "floor"


class Cap(FromFile):
    kind: Literal["cap"] = "cap"


class Rescale(FromFile):
    kind: Literal["rescale"] = "rescale"
    amplify: bool = False


class Ablate(FromFile):
    kind: Literal["ablate"] = "ablate"


class MeanAblate(FromFile):
    kind: Literal["mean_ablate"] = "mean_ablate"


class ProjectOut(FromFile):
    kind: Literal["project_out"] = "project_out"


class Rotate(FromFile):
    kind: Literal["rotate"] = "rotate"


FeatureEdit = Clamp | Floor | Cap | Rescale | Ablate | MeanAblate
DirectionEdit = Add | ProjectOut | Rotate
Edit = FeatureEdit | DirectionEdit


@dataclass(frozen=True, kw_only=True)
class NodeValues:
    """The numbers of the nodes of one plan at one site."""

    strength: Float[Tensor, "node"]
    scale: Float[Tensor, "node"]
    mean: Float[Tensor, "node"]


def reads_activation(edit: Edit) -> bool:
    """Whether the edit needs the feature's activation, hence an encoder."""
    return not isinstance(edit, (Add, ProjectOut, Rotate))


def new_activation(
    edit: FeatureEdit, a: Float[Tensor, "token node"], values: NodeValues
) -> Float[Tensor, "token node"]:
    """The activation that the edit wants, given the present one. At strength 0 it is `a` itself."""
    s, m = values.strength, values.scale
    match edit:
        case Clamp():
            wanted = (s * m).expand_as(a)
        case Floor():
            wanted = torch.maximum(a, s * m)
        case Cap():
            wanted = torch.where(a > 0, torch.minimum(a, (1 - s) * m), a)
        case Rescale(amplify=amplify):
            wanted = a * (1 + s if amplify else 1 - s)
        case Ablate():
            wanted = a * (1 - s.clamp(max=1))
        case MeanAblate():
            wanted = a + s.clamp(max=1) * (values.mean - a)
        case _:
            assert_never(edit)
    return torch.where(s == 0, a, wanted)


def coefficients(
    edit: Edit,
    h: Float[Tensor, "token d_model"],
    a: Float[Tensor, "token node"] | None,
    rows: Float[Tensor, "node d_model"],
    values: NodeValues,
) -> Float[Tensor, "token node"]:
    """`c` such that the edit moves `h` by `c @ rows`. `a` is needed where `reads_activation`;
    Rotate has none."""
    match edit:
        case Add():
            unit_length = rows.norm(dim=-1).clamp(min=1e-12)
            return (values.strength * values.scale / unit_length).expand(h.shape[0], -1)
        case ProjectOut():
            along = (h @ rows.T - values.mean * rows.norm(dim=-1)) @ torch.linalg.pinv(
                rows @ rows.T, hermitian=True
            )
            return -values.strength.clamp(max=1) * along
        case Rotate():
            raise TypeError("a rotation is not a sum of rows; use `rotated`")
        case _:
            if a is None:
                raise TypeError(f"{edit.kind} needs the activation")
            return new_activation(edit, a, values) - a


def rotated(
    h: Float[Tensor, "token d_model"], row: Float[Tensor, "d_model"], strength: float | Tensor
) -> Float[Tensor, "token d_model"]:
    """`h` turned towards `row` by min(strength, 1) × 90°, its norm kept. Vectors parallel to `row`
    stay."""
    angle = float(min(float(strength), 1.0)) * math.pi / 2
    norm = h.norm(dim=-1, keepdim=True)
    unit = h / norm.clamp(min=1e-12)
    across = row / row.norm().clamp(min=1e-12)
    across = across - (unit @ across)[:, None] * unit
    length = across.norm(dim=-1, keepdim=True)
    turned = norm * (math.cos(angle) * unit + math.sin(angle) * across / length.clamp(min=1e-12))
    return torch.where(length > 1e-6, turned, h)


def with_norm_of(
    edited: Float[Tensor, "token d_model"], h: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token d_model"]:
    """`edited` scaled to the norm of `h`."""
    return edited * (
        h.norm(dim=-1, keepdim=True) / edited.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    )
