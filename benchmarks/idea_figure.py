"""The idea in one picture, for the README: sites, SAEs, links, a flow, steering.

python -m benchmarks.idea_figure        docs/images/idea.png and .svg
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featureflow.figures import COLOURS, save

OUT = Path(__file__).parent.parent / "docs" / "images" / "idea"
GREY = "#b8bec6"
FLOW = {0: 1, 1: 3, 2: 2, 3: 2}
"""Which feature of each site the flow goes through; it is born at the first and dies after the
last."""
LINKS = {(0, 0, 0), (1, 0, 1), (1, 4, 4), (2, 0, 0), (2, 4, 3), (2, 4, 4)}
"""Other kept links: site, feature, feature of the next site."""
N_SITES, N_FEATURES = 5, 5


def main() -> None:
    """Draw and save."""
    figure = Figure(figsize=(9.2, 3.4))
    axis = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    axis.set(xlim=(-1.2, 6.1), ylim=(-1.35, 6.1))
    axis.axis("off")
    _stream(axis)
    _features(axis)
    _words(axis)
    save(figure, OUT)


def _stream(axis: Axes) -> None:
    """The residual stream with its sites."""
    axis.annotate(
        "",
        xy=(5.1, -0.4),
        xytext=(-0.8, -0.4),
        arrowprops={"arrowstyle": "-|>", "lw": 5, "color": GREY},
    )
    for site in range(N_SITES):
        axis.plot(site, -0.4, "o", color="white", markeredgecolor="#444", markersize=15, zorder=3)
        axis.text(site, -0.42, f"L{site}", ha="center", va="center", fontsize=7, zorder=4)
        axis.plot([site, site], [-0.15, 0.6], color=GREY, lw=1, zorder=0)
    axis.text(-0.95, -0.42, "text", ha="center", va="center", fontsize=9)
    axis.text(5.2, -0.42, "next token", ha="left", va="center", fontsize=9)


def _features(axis: Axes) -> None:
    """One SAE a site, kept links, and the flow in colour."""
    for site in range(N_SITES):
        for feature in range(N_FEATURES):
            on = FLOW.get(site) == feature
            axis.plot(
                site,
                0.9 + feature,
                "o",
                color=COLOURS[1] if on else "white",
                markeredgecolor=COLOURS[1] if on else "#777",
                markersize=13 if on else 9,
                zorder=3,
            )
    for site, a, b in LINKS:
        axis.plot([site, site + 1], [0.9 + a, 0.9 + b], color=GREY, lw=1.2, zorder=1)
    for site in list(FLOW)[:-1]:
        ends = [0.9 + FLOW[site], 0.9 + FLOW[site + 1]]
        axis.plot([site, site + 1], ends, color=COLOURS[1], lw=4, zorder=2, alpha=0.8)


def _words(axis: Axes) -> None:
    """What is what."""
    said = {
        "font": {"fontsize": 9, "color": "#333"},
        "arrow": {"arrowstyle": "-", "color": "#777", "lw": 0.8},
    }
    marks = [
        ("1 site: activations are stored", (1, -0.62), (1.0, -1.2)),
        ("2 SAE: features of a site", (0, 4.9), (-0.2, 5.85)),
        ("3 link: same direction, active together,\nbeyond its siblings", (1.5, 3.4), (1.7, 5.75)),
        ("4 flow: where it is born, changes, dies", (3, 2.9), (3.7, 5.85)),
        ("5 steer: push or remove along the flow", (3, 2.7), (3.9, -1.2)),
    ]
    for text, at, place in marks:
        axis.annotate(
            text,
            xy=at,
            xytext=place,
            ha="center",
            va="center",
            **said["font"],
            arrowprops=said["arrow"],
        )


if __name__ == "__main__":
    main()
