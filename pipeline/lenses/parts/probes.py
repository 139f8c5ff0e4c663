"""Linear probes: fitted on some texts, judged on others.

`scores` standardises by the training texts and fits a logistic regression with balanced classes
(L2, C = 1). `best_columns` ranks columns by |difference of means| / σ on the training texts alone.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score


def scores(
    x: Float[np.ndarray, "text column"],
    y: Int[np.ndarray, "text"],
    x_test: Float[np.ndarray, "test column"],
) -> Float[np.ndarray, "test class"]:
    """Probabilities of the classes (sorted) on the test texts."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    probe = LogisticRegression(class_weight="balanced", max_iter=300, tol=1e-3)
    probe.fit((x - mean) / spread, y)
    return probe.predict_proba((x_test - mean) / spread)


def right(
    x: Float[np.ndarray, "text column"],
    y: Int[np.ndarray, "text"],
    x_test: Float[np.ndarray, "test column"],
    y_test: Int[np.ndarray, "test"],
) -> Float[np.ndarray, "test"]:
    """1 where the probe names the class of a test text, else 0."""
    return (np.unique(y)[scores(x, y, x_test).argmax(1)] == y_test).astype(float)


def best_columns(
    x: Float[np.ndarray, "text column"], y: Int[np.ndarray, "text"], k: int
) -> Int[np.ndarray, "k"]:
    """The `k` columns whose means differ most between y = 1 and y = 0, in units of σ."""
    apart = np.abs(x[y == 1].mean(0) - x[y == 0].mean(0)) / (x.std(0) + 1e-6)
    return np.argsort(-apart, kind="stable")[:k]


def judged(
    probability: Float[np.ndarray, "test"], y: Int[np.ndarray, "test"]
) -> tuple[float, float]:
    """F1 at one half, and AUROC."""
    f1 = f1_score(y, probability > 0.5, zero_division=0)
    return float(f1), float(roc_auc_score(y, probability)) if 0 < y.mean() < 1 else float("nan")
