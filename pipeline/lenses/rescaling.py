"""What happens to a feature, and to the loss, when all its active predecessors are rescaled
together?

For layers spread over the depth, active features of every activity group are drawn. All their
active top-1 predecessors are multiplied by r on the token, in one run of the model; the activation
change and the relative change of the context's loss are read. Cost: targets × 8 values of r × one
context to the end. Source: Feature Flow §5.2, Fig. 7.
"""

from __future__ import annotations

from pipeline.findings import Finding
from pipeline.flow.activity import GROUPS, MEMBERS
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.joint_edits import Cases, Change, changed_trials, means_by
from pipeline.lenses.parts.layers import Trials, with_features
from pipeline.run import Run

TITLE = "rescale predecessors, read the loss (Feature Flow, Fig. 7)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
SCALES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.5, 2.0, 3.0)


class Config(Trials):
    """How much is tested."""


def look(run: Run, config: Config) -> Finding:
    """Activation change and relative change of the loss, by group and r."""
    trials = changed_trials(run, _changes, **dict(config), with_loss=True)
    summary = means_by(trials, ("group", "scale"), ("change", "loss_change"), config.seed)
    largest = float(summary["loss_change"].abs().max()) if len(summary) else float("nan")
    removed = summary[summary["scale"] == 0.0].set_index("group")["change"]
    listed = ", ".join(f"{group} {value:.2f}" for group, value in removed.items())
    return Finding(
        tables={"summary": summary, "trials": with_features(trials)},
        figure=lambda: lines(
            summary,
            x="scale",
            line="group",
            columns={"change": "activation change", "loss_change": "relative change of loss"},
            x_label="r",
        ),
        text="What the paper saw (Fig. 7): the activation change grows nonlinearly below r = 1; "
        "the loss hardly moves (the\n"
        "figure ends at a relative change of 0.001); RES&MLP costs more loss than RES alone.\n\n"
        f"What this model shows: activation change at r = 0: {listed or 'nothing was tested'}. "
        "Largest mean\n"
        f"relative change of a context's loss over groups and scales: {largest:.5f}.",
        headline={"largest relative loss change": round(largest, 6)}
        | {f"change {group}": value for group, value in removed.items()},
    )


def _changes(cases: Cases) -> list[Change]:
    return [
        Change(case=i, relations=MEMBERS[GROUPS[group]], scale=r)
        for i, group in enumerate(cases.group)
        for r in SCALES
        if group
    ]
