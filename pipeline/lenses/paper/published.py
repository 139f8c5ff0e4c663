"""Numbers printed in Feature Flow (arXiv 2502.03032) and SAE Match (arXiv 2410.07656), for tables
beside one's own.

Gemma 2 2B with Gemma Scope 16k dictionaries. Values that appear only as bars or lines are not here.
"""

from __future__ import annotations

import pandas as pd

from pipeline.flow.activity import GROUPS

_FIG_13 = (
    (1.0, 0.49, 0.32, 0.19, 0.26, 0.17, 0.10, 0.11),
    (0.72, 1.0, 0.29, 0.20, 0.33, 0.22, 0.091, 0.13),
    (0.82, 0.50, 1.0, 0.25, 0.45, 0.18, 0.21, 0.18),
    (0.82, 0.59, 0.42, 1.0, 0.33, 0.45, 0.30, 0.28),
    (0.75, 0.66, 0.50, 0.22, 1.0, 0.22, 0.16, 0.22),
    (0.76, 0.72, 0.32, 0.49, 0.35, 1.0, 0.21, 0.33),
    (0.82, 0.51, 0.67, 0.57, 0.46, 0.37, 1.0, 0.42),
    (0.74, 0.62, 0.50, 0.47, 0.53, 0.50, 0.37, 1.0),
)
COOCCURRENCE = pd.DataFrame(_FIG_13, index=list(GROUPS), columns=list(GROUPS))
"""Fig. 13: P(a feature of the row's group also appears in the column's group)."""

TABLE_1 = {"top-1": (0.65, 0.75), "pearson": (0.65, 0.74), "best single active": (0.73, 0.83)}
"""Success and activation change, single-predecessor groups, 1,894 features of two layers."""

WEAK_SEPARATION = {
    ("residual", "nowhere", "ATT"): 0.76,
    ("residual", "MLP", "MLP&ATT"): 0.67,
    ("residual", "RES&MLP", "RES&MLP&ATT"): 0.56,
    ("mlp", "MLP", "MLP&ATT"): 0.72,
    ("mlp", "RES&MLP", "RES&MLP&ATT"): 0.58,
    ("attention", "ATT", "RES&ATT"): 0.67,
    ("attention", "RES&ATT", "MLP&ATT"): 0.72,
    ("attention", "MLP&ATT", "RES&MLP&ATT"): 0.56,
}
"""Fig. 14: the pairs with a share of significant tests below 0.80; every other pair has 0.80 or
more."""

EV_TOP_1, EV_PERMUTATION_FOLDED, EV_PERMUTATION = 0.791, (0.783, 0.786), (0.747, 0.751)
"""Fig. 23, layers 14 → 15: top-1 decoder cosine; permutations with and without folded inference."""
