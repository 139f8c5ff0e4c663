"""The account of what steering did: tokens seen and touched, realised size of the change,
activations before and after.

Sums are kept as tensors on the model's device and read once, at the end, so that counting never
waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What happened at one node of one plan. `mean_before` is the feature's mean activation as it
    arrived, over the tokens in scope; `relative_size` is mean ‖change‖/‖h‖ at the node's site over
    the tokens touched."""

    plan: int
    at: str
    n_seen: int
    n_touched: int
    mean_before: float | None
    mean_after: float | None
    relative_size: float


@dataclass(frozen=True, kw_only=True)
class SteeringReport:
    nodes: tuple[NodeReport, ...]
    n_passes: int

    def n_touched(self, plan: int = 0) -> int:
        """How many (token, node) pairs of a plan were changed."""
        return sum(node.n_touched for node in self.nodes if node.plan == plan)


@dataclass(eq=False)
class Tally:
    """Sums over the tokens of a site's part; read once, at the end."""

    seen: Tensor
    touched: Tensor
    before: Tensor
    after: Tensor
    size: Tensor
    n_sized: Tensor
    knows_activation: bool = False
    n_calls: int = 0

    @classmethod
    def zeros(cls, n_nodes: int, device: torch.device) -> Tally:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            seen=zero(n_nodes),
            touched=zero(n_nodes),
            before=zero(n_nodes),
            after=zero(n_nodes),
            size=zero(),
            n_sized=zero(),
        )

    def add(
        self,
        h: Tensor,
        delta: Tensor,
        touched: Tensor,
        mask: Tensor,
        c: Tensor,
        a: Tensor | None,
        *,
        adds: bool,
    ) -> None:
        self.n_calls += 1
        self.seen += mask.sum(0)
        self.touched += (c != 0).sum(0)
        if a is not None:
            self.knows_activation = True
            self.before += torch.where(mask, a, 0).sum(0)
            self.after += torch.where(mask, a + c if adds else a, 0).sum(0)
        ratio = delta.norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-12)
        self.size += torch.where(touched, ratio, 0).sum()
        self.n_sized += touched.sum()

    def reports(self, plan: int, names: Sequence[str]) -> Iterator[NodeReport]:
        size = float(self.size / self.n_sized.clamp(min=1))
        for k, name in enumerate(names):
            n_seen = int(self.seen[k])
            known = self.knows_activation and n_seen > 0
            yield NodeReport(
                plan=plan,
                at=name,
                n_seen=n_seen,
                n_touched=int(self.touched[k]),
                mean_before=float(self.before[k]) / n_seen if known else None,
                mean_after=float(self.after[k]) / n_seen if known else None,
                relative_size=size,
            )
