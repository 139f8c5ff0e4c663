"""A steered model that other programs take for an ordinary Hugging Face model.

    steered = SteeredModel(model, saes, plan)
    steered(input_ids=…)        steered.generate(input_ids, max_new_tokens=…)        steered.config
    …

`forward` and `generate` have the signatures of the wrapped model and run with the plan applied;
everything else is the wrapped model's own. The hooks are on only while such a call runs, so the
same weights serve unsteered calls in between. An evaluation harness that calls the model in a loop
needs nothing else. Beam search is refused: it reorders the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featureflow.errors import UserError
from featureflow.sites import Site
from steering.hooks import RowPlan, SteeringReport, applied
from steering.plan import Plan
from steering.sequences import Dictionary, SteerableModel


class SteeredModel(torch.nn.Module):
    """See the module's text. `last_report` tells what the latest call touched."""

    def __init__(
        self,
        model: SteerableModel,
        saes: Mapping[Site, Dictionary],
        plan: Plan | Sequence[Plan | RowPlan],
    ) -> None:
        super().__init__()
        self.hf = model.hf
        self.__dict__["_model"] = model
        self.__dict__["_saes"] = saes
        self.__dict__["_plan"] = plan
        self.last_report: SteeringReport | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward with the plan applied."""
        with applied(self._model, self._saes, self._plan) as run:
            out = self.hf(*args, **kwargs)
        self.last_report = run.report()
        return out

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's generate with the plan applied to every step."""
        config = kwargs.get("generation_config", self.hf.generation_config)
        if (kwargs.get("num_beams") or getattr(config, "num_beams", 1) or 1) > 1:
            raise UserError("a steered model cannot search with beams", expected="num_beams=1")
        with applied(self._model, self._saes, self._plan) as run:
            out = self.hf.generate(*args, **kwargs)
        self.last_report = run.report()
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("hf"), name)
