"""The choices a linking run offers, as small frozen dataclasses: which chance to compare with,
which links to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import Doc

from featureflow.settings import ByKind, Settings
from pipeline.flow.matchers import SHARED
from pipeline.flow.null import FarLayers, Isotropic, Rotation, Shuffled, Siblings


class Automatic(Settings):
    """Each pair is judged by the strictest null that applies to it: siblings always; for
    dictionaries of one start also dictionaries that left that start for unrelated data (trained
    here, or else far layers), and the activation itself."""

    trained_pairs: Annotated[
        int,
        Ge(0),
        Doc(
            "same-start pairs of each relation for which a null dictionary is trained; 0: far "
            "layers"
        ),
    ] = 1
    kind: Literal["automatic"] = "automatic"


NullChoice = Annotated[Automatic | Siblings | Rotation | FarLayers | Isotropic | Shuffled, ByKind()]


class Calibrated(Settings):
    """Keep links up to a false-discovery rate, judged pair by pair against the null."""

    fdr: Annotated[float, Gt(0), Lt(1), Doc("share of kept links that may be chance")] = 0.05
    kind: Literal["calibrated"] = "calibrated"


class Fixed(Settings):
    """Keep links above the paper's cosines (Feature Flow, appendix B.2)."""

    residual: Annotated[
        float, Ge(0), Le(1), Doc("smallest cosine between residual dictionaries")
    ] = 0.5
    modules: Annotated[
        float, Ge(0), Le(1), Doc("smallest cosine from an MLP or attention dictionary")
    ] = 0.15
    kind: Literal["fixed"] = "fixed"


Thresholds = Annotated[Calibrated | Fixed, ByKind()]


LEAST_AGREEMENT = 0.3
"""About half of what two dictionaries of one layer reach (0.63 at SmolLM2's L22), far above the
chance of two latents (99th percentile 0.13)."""


@dataclass(frozen=True, kw_only=True)
class LinkOptions:
    """Everything that changes the links between given dictionaries."""

    matcher: str = SHARED
    top_k: int = 5
    null: NullChoice = field(default_factory=Automatic)
    n_null: int = 8192
    thresholds: Thresholds = field(default_factory=Calibrated)
    least_agreement: float = LEAST_AGREEMENT
    seed: int = 0
    tile: int = 2048
