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
| Cap          | a' = min(a, (1 − s)·m) where a > 0: the same for suppression   |
| Rescale      | a' = (1 − s)·a, or (1 + s)·a with `amplify`; the paper's r     |
| Ablate       | a' = (1 − min(s, 1))·a                                         |
| MeanAblate   | a' = a + min(s, 1)·(mean − a)                                  |
| ProjectOut   | h' = h − min(s, 1)·((h·u) − mean)·u, several u at once by their pseudo-inverse |
| Rotate       | h' = ‖h‖(cos θ·ĥ + sin θ·u⊥), θ = min(s, 1)·90°                |

An edit of your own is one class in one file: derive it from `FeatureEdit` (give
`new_activation`) or `Edit` (give `coefficients`), and register it: with `@register_edit`, or from
another package with an entry point (featureflow/plugins.py).

Cost: one product with the selected decoder rows a site; the encoder columns only for edits of
features. Sources: AxBench (clamp, min-clamp), Feature Flow (rescale, add), saklas (rotation),
refusal-direction (projection).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.plugins import plugins
from featureflow.settings import Settings


@dataclass(frozen=True, kw_only=True)
class NodeValues:
    """The numbers of the nodes of one plan at one site."""

    strength: Float[Tensor, "node"]
    scale: Float[Tensor, "node"]
    mean: Float[Tensor, "node"]


class Edit(Settings):
    """What is done at the nodes of a plan: by default, a multiple of each node's row is added."""

    kind: str = ""
    reads_activation: ClassVar[bool] = False
    """Needs the feature's activation, hence an encoder."""
    adds_up: ClassVar[bool] = False
    """The changes of the nodes of a flow add up, so that they share one budget."""
    is_sum: ClassVar[bool] = True
    """The change is a sum of rows. If not, a site has one node, because the order would matter."""

    def coefficients(
        self,
        h: Float[Tensor, "token d_model"],
        a: Float[Tensor, "token node"] | None,
        rows: Float[Tensor, "node d_model"],
        values: NodeValues,
    ) -> Float[Tensor, "token node"]:
        """`c` such that the edit moves `h` by `c @ rows`. `a` is given where activations are
        read."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def change(
        self,
        h: Float[Tensor, "token d_model"],
        a: Float[Tensor, "token node"] | None,
        rows: Float[Tensor, "node d_model"],
        values: NodeValues,
        mask: Bool[Tensor, "token node"],
    ) -> tuple[Float[Tensor, "token node"], Float[Tensor, "token d_model"]]:
        """(coefficients, change of `h`), zero where `mask` is False."""
        c = torch.where(mask, self.coefficients(h, a, rows, values), 0.0)
        return c, c @ rows


class FeatureEdit(Edit):
    """An edit that chooses a feature's new activation."""

    reads_activation: ClassVar[bool] = True

    def new_activation(
        self, a: Float[Tensor, "token node"], values: NodeValues
    ) -> Float[Tensor, "token node"]:
        """The activation that is wanted, given the present one; strength 0 is not asked."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def coefficients(
        self, h: Tensor, a: Tensor | None, rows: Tensor, values: NodeValues
    ) -> Float[Tensor, "token node"]:
        if a is None:
            raise TypeError(f"{self.kind} needs the activation")
        return torch.where(values.strength == 0, a, self.new_activation(a, values)) - a


_REGISTERED: dict[str, type[Edit]] = {}
_E = TypeVar("_E", bound=type[Edit])


def register_edit(edit: _E) -> _E:
    """Let plans name this class by its `kind`. Raises UserError for a name that is taken."""
    found: type[Edit] = edit
    kind = str(found.model_fields["kind"].default)
    other = _REGISTERED.setdefault(kind, edit)
    if other is not edit or not kind:
        raise UserError(
            f"an edit needs a kind of its own, {kind!r} is none",
            where=f"{edit.__module__}.{edit.__qualname__}",
            found=f"{other.__module__}.{other.__qualname__}",
        )
    return edit


def edits() -> Mapping[str, type[Edit]]:
    """Every edit by its kind: those of this file, registered ones, and those that packages add."""
    _read_plugins()
    return _REGISTERED


def edit_named(kind: str, **options: Any) -> Edit:
    """The edit of that kind. Raises UserError for an unknown one."""
    if kind not in edits():
        raise UserError(f"there is no edit {kind!r}", expected=", ".join(edits()))
    return edits()[kind](**options)


@cache
def _read_plugins() -> None:
    for name, found in plugins("edits").items():
        if not (isinstance(found, type) and issubclass(found, Edit)):
            raise UserError(
                f"what a package adds as the edit {name!r} is none",
                expected="a class derived from steering.edits.Edit",
                found=repr(found),
            )
        register_edit(found)


@register_edit
class Add(Edit):
    kind: Literal["add"] = "add"
    keep_norm: bool = False
    adds_up: ClassVar[bool] = True

    def coefficients(
        self, h: Tensor, a: Tensor | None, rows: Tensor, values: NodeValues
    ) -> Float[Tensor, "token node"]:
        unit_length = rows.norm(dim=-1).clamp(min=1e-12)
        return (values.strength * values.scale / unit_length).expand(h.shape[0], -1)

    def change(
        self, h: Tensor, a: Tensor | None, rows: Tensor, values: NodeValues, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        c, delta = super().change(h, a, rows, values, mask)
        return c, with_norm_of(h + delta, h) - h if self.keep_norm else delta


@register_edit
class Clamp(FeatureEdit):
    kind: Literal["clamp"] = "clamp"

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return (values.strength * values.scale).expand_as(a)


@register_edit
class Floor(FeatureEdit):
    kind: Literal["floor"] = "floor"

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return torch.maximum(a, values.strength * values.scale)


@register_edit
class Cap(FeatureEdit):
    kind: Literal["cap"] = "cap"

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return torch.where(a > 0, torch.minimum(a, (1 - values.strength) * values.scale), a)


@register_edit
class Rescale(FeatureEdit):
    kind: Literal["rescale"] = "rescale"
    amplify: bool = False

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return a * (1 + values.strength if self.amplify else 1 - values.strength)


@register_edit
class Ablate(FeatureEdit):
    kind: Literal["ablate"] = "ablate"

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return a * (1 - values.strength.clamp(max=1))


@register_edit
class MeanAblate(FeatureEdit):
    kind: Literal["mean_ablate"] = "mean_ablate"

    def new_activation(self, a: Tensor, values: NodeValues) -> Tensor:
        return a + values.strength.clamp(max=1) * (values.mean - a)


@register_edit
class ProjectOut(Edit):
    kind: Literal["project_out"] = "project_out"

    def coefficients(
        self, h: Tensor, a: Tensor | None, rows: Tensor, values: NodeValues
    ) -> Float[Tensor, "token node"]:
        along = (h @ rows.T - values.mean * rows.norm(dim=-1)) @ torch.linalg.pinv(
            rows @ rows.T, hermitian=True
        )
        return -values.strength.clamp(max=1) * along


@register_edit
class Rotate(Edit):
    kind: Literal["rotate"] = "rotate"
    is_sum: ClassVar[bool] = False

    def change(
        self, h: Tensor, a: Tensor | None, rows: Tensor, values: NodeValues, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = (mask & (values.strength != 0)).float()
        return c, (rotated(h, rows[0], values.strength[0]) - h) * c


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
