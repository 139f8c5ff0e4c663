"""The paper's steering experiments as figures and as a text: what the paper saw, what this model
shows.

Figures: `deactivation.png` (removed against r, and against the loss guard), `activation.png`
(selectivity against s and against dose), `layers.png` (layer × s, the mean selectivity of single
layers and of layers up to).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from featureflow.figures import panels, save
from featureflow.statistics import Interval, bootstrap_mean
from pipeline.lenses.steering.figures import curves

REPORT = "report.md"


def write_paper_report(
    deactivation: pd.DataFrame, activation: pd.DataFrame, folder: Path, *, seed: int = 0
) -> Path:
    """Tables, figures and text into `folder`; the path of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    deactivation.to_parquet(folder / "deactivation.parquet", index=False)
    activation.to_parquet(folder / "activation.parquet", index=False)
    _draw(deactivation, activation, folder)
    lines = [
        "# The paper's steering experiments on this model",
        "",
        f"Topics: {', '.join(deactivation['topic'].unique())}. Intervals: 95 %, bootstrap over "
        "topics. Texts are "
        "WordNet definitions of the test split; no judge. Paper: Feature Flow, section 5.3, "
        "appendices B and C.3, on "
        "Gemma 2 2B.",
        "",
        "## Deactivation over r",
        "",
        "| the paper saw | this model shows |",
        "|---|---|",
        *(f"| {saw} | {shows} |" for saw, shows in _deactivation_findings(deactivation, seed)),
        "",
        "![deactivation](deactivation.png)",
        "",
        *_grid(deactivation, _best_layers(deactivation, "removed"), "r", "removed"),
        "",
        "Fall of the topic texts' log-likelihood, nats a token; layer modes: the best layer of "
        "each topic and r.",
        "",
        "## Activation over s",
        "",
        "| the paper saw | this model shows |",
        "|---|---|",
        *(f"| {saw} | {shows} |" for saw, shows in _activation_findings(activation, seed)),
        "",
        "![activation](activation.png)",
        "",
        *_activation_grid(activation),
        "",
        "![layers](layers.png)",
    ]
    path = folder / REPORT
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _deactivation_findings(table: pd.DataFrame, seed: int) -> list[tuple[str, str]]:
    best = _best_layers(table, "removed")
    small, large = best["r"].max(), best["r"].min()
    flow_seeds = _difference(best[best["r"] == small], "whole flow", "seeds", "removed", seed)
    flow_layer = _difference(best[best["r"] == small], "whole flow", "layer", "removed", seed)
    large_layer = _difference(best[best["r"] == large], "whole flow", "layer", "removed", seed)
    control = _difference(best[best["r"] == 0.0], "whole flow", "random", "removed", seed)
    guard = _difference(best[best["r"] == large], "whole flow", "random", "guard", seed)
    first, last = (_mean_layer(table, r) for r in (small, large))
    return [
        (
            "the flow's features remove more than the seeds alone, most at small perturbations",
            f"at r = {small:g}, whole flow minus seeds: {_shown(flow_seeds)} nats a token",
        ),
        (
            "cumulative beats the best single layer where the perturbation is small",
            f"whole flow minus best single layer: {_shown(flow_layer)} at r = {small:g}, "
            f"{_shown(large_layer)} at "
            f"r = {large:g}",
        ),
        (
            "(no control)",
            f"at r = 0, whole flow minus as many random features: {_shown(control)} nats a token",
        ),
        (
            "(no control)",
            f"at r = {large:g}, rise of the loss on other texts, whole flow minus random: "
            f"{_shown(guard)} (relative)",
        ),
        (
            "a larger perturbation moves the best single layer earlier",
            f"mean best layer {first:.1f} at r = {small:g}, {last:.1f} at r = {large:g}",
        ),
    ]


def _activation_findings(table: pd.DataFrame, seed: int) -> list[tuple[str, str]]:
    whole = table[table["layer"].isna()]
    s = sorted(whole["s"].unique())[len(whole["s"].unique()) // 2]
    at = whole[whole["s"] == s].assign(arm=lambda t: t["mode"] + " " + t["schedule"])

    def beside(arm: str, other: str, measure: str) -> str:
        return _shown(_difference(at, arm, other, measure, seed, key="arm"))

    rows = [
        (
            "cumulative steering raises the topic more than the single layer",
            f"at s = {s:g} a layer, selectivity, whole flow minus seed's layer: "
            + beside("whole flow constant", "seeds constant", "selectivity"),
        ),
        (
            "but can lower coherence",
            "share of samples coherent, the same: "
            + beside("whole flow constant", "seeds constant", "coherent"),
        ),
    ]
    rows += [
        (
            "which schedule is best differs by theme",
            f"{name} minus constant, samples on topic and coherent: "
            + beside(f"whole flow {name}", "whole flow constant", "succ_coh"),
        )
        for name in ("exponential", "linear")
    ]
    rows += [
        (
            "(no control)",
            f"at s = {s:g}, selectivity, whole flow minus {name}: "
            + beside("whole flow constant", f"{name} constant", "selectivity"),
        )
        for name in ("copied", "random")
    ]
    return rows


def _difference(
    table: pd.DataFrame, one: str, other: str, value: str, seed: int, *, key: str = "mode"
) -> Interval:
    """Paired over topics."""
    sides = [table[table[key] == name].groupby("topic")[value].mean() for name in (one, other)]
    return bootstrap_mean((sides[0] - sides[1]).dropna().tolist(), seed=seed)


def _best_layers(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Layer modes reduced to each topic's best layer at each r; chosen on the very texts, hence a
    ceiling."""
    layered = table[table["layer"].notna()]
    best = layered.loc[layered.groupby(["topic", "mode", "r"])[value].idxmax()]
    return pd.concat([table[table["layer"].isna()], best], ignore_index=True)


def _mean_layer(table: pd.DataFrame, r: float) -> float:
    best = _best_layers(table, "removed")
    return float(best[(best["mode"] == "layer") & (best["r"] == r)]["layer"].mean())


def _draw(deactivation: pd.DataFrame, activation: pd.DataFrame, folder: Path) -> None:
    best = (
        _best_layers(deactivation, "removed")
        .groupby(["mode", "r"], sort=False)[["removed", "guard"]]
        .mean()
    )
    removed = best.reset_index().rename(columns={"mode": "arm"})
    drawn = curves(
        [
            (removed.assign(value=removed["removed"]), "removed, nats a token"),
            (removed.assign(value=removed["guard"]), "relative rise of the loss on other texts"),
        ],
        x="r",
        xlabel="r (what is left of the features)",
        title="Deactivation",
        log=False,
    )
    save(drawn, folder / "deactivation.png")
    whole = activation[activation["layer"].isna()].assign(
        arm=lambda t: t["mode"] + ", " + t["schedule"]
    )
    mean = (
        whole.groupby(["arm", "s"], sort=False)[["kl", "selectivity", "succ_coh"]]
        .mean()
        .reset_index()
    )
    drawn = curves(
        [
            (mean.assign(value=mean["selectivity"]), "selectivity, nats a token"),
            (mean.assign(value=mean["succ_coh"]), "samples on topic and coherent"),
        ],
        x="kl",
        xlabel="dose (nats on neutral text)",
        title="Activation",
    )
    save(drawn, folder / "activation.png")
    save(_layers(activation[activation["mode"] == "up to"]), folder / "layers.png")


def _layers(table: pd.DataFrame) -> Figure:
    """Layer × s: the mean selectivity of layers up to."""
    grid = table.pivot_table(index="layer", columns="s", values="selectivity")
    figure, (axis,) = panels(width=1.6 + 0.7 * grid.shape[1], height=1.6 + 0.25 * grid.shape[0])
    image = axis.imshow(grid.to_numpy(), aspect="auto", cmap="cividis", origin="lower")
    axis.set_xticks(range(grid.shape[1]), [f"{s:g}" for s in grid.columns])
    axis.set_yticks(range(grid.shape[0]), [f"L{layer:g}" for layer in grid.index])
    axis.set(xlabel="s", title="Selectivity, layers up to")
    figure.colorbar(image)
    return figure


def _grid(table: pd.DataFrame, reduced: pd.DataFrame, columns: str, value: str) -> list[str]:
    grid = reduced.pivot_table(index="mode", columns=columns, values=value, sort=False)
    grid = grid[sorted(grid.columns, reverse=True)]
    head = "| mode | " + " | ".join(f"{columns} = {name:g}" for name in grid.columns) + " |"
    body = [
        f"| {mode} | " + " | ".join(f"{cell:.3f}" for cell in row) + " |"
        for mode, row in grid.iterrows()
    ]
    return [head, "|" + "---|" * (grid.shape[1] + 1), *body] if len(table) else []


def _activation_grid(table: pd.DataFrame) -> list[str]:
    whole = table[table["layer"].isna()]
    measures: Sequence[str] = ("kl", "selectivity", "success", "coherent", "succ_coh")
    mean = whole.groupby(["mode", "schedule", "s"], sort=False)[list(measures)].mean().reset_index()
    head = "| mode | schedule | s | " + " | ".join(measures).replace("_", " ") + " |"
    body = [
        f"| {row['mode']} | {row['schedule']} | {row['s']:g} | "
        + " | ".join(f"{row[m]:.3f}" for m in measures)
        + " |"
        for row in mean.to_dict(orient="records")
    ]
    return [head, "|" + "---|" * (len(measures) + 3), *body]


def _shown(interval: Interval) -> str:
    """Without an interval where there is only one topic."""
    if interval.n < 2:
        return f"{interval.mean:+.3f} (one topic)"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
