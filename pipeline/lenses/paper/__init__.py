"""The experiments of Feature Flow and SAE Match, each as one function from a linked model to
tables, figure and text.

    finding = run_experiment("groups", subject, Effort())
    write_finding(finding, folder)

`EXPERIMENTS` says where each function is; it is imported when it is run. Published numbers are in
published.py.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from featureflow.errors import UserError

if TYPE_CHECKING:
    from pipeline.lenses.paper.subject import Effort, Finding, Subject

EXPERIMENTS: dict[str, tuple[str, str, str]] = {
    "groups": (
        "groups",
        "group_shares",
        "shares of the eight activity groups by layer (Feature Flow, Fig. 5 and 12)",
    ),
    "cooccurrence": (
        "groups",
        "group_cooccurrence",
        "which groups share features (Feature Flow, Fig. 13)",
    ),
    "separation": (
        "groups",
        "score_separation",
        "which link scores tell groups apart (Feature Flow, Fig. 4 and 14)",
    ),
    "deactivation": (
        "interventions",
        "deactivation",
        "remove predecessors (Feature Flow, Fig. 6, Table 1)",
    ),
    "rescaling": (
        "interventions",
        "rescaling",
        "rescale predecessors, read the loss (Feature Flow, Fig. 7)",
    ),
    "knockouts": (
        "interventions",
        "knockouts",
        "remove every subset of predecessors (Feature Flow, Fig. 8 and 15)",
    ),
    "remainder": (
        "remainder",
        "remainder",
        "what keeps targets alive whose predecessor was removed (in neither paper)",
    ),
    "chains": (
        "chains",
        "chains",
        "remove ancestors, hold the chain between (indirect effects; in neither paper)",
    ),
    "transitions": (
        "operators",
        "transitions",
        "carry latents by operators (Feature Flow, Fig. 23 and 24)",
    ),
    "sae-match": (
        "operators",
        "sae_match",
        "permutations, skipped layers, compositions (SAE Match, Fig. 3, 7, 8, 10)",
    ),
    "matchers": (
        "operators",
        "matchers",
        "six ideas of the same feature, compared on the same targets",
    ),
}
"""Module, function and one line about each."""
FIGURE, REPORT = "figure.png", "report.txt"


def run_experiment(name: str, subject: Subject, effort: Effort) -> Finding:
    """Run one experiment. Raises UserError for a name that is none."""
    if name not in EXPERIMENTS:
        raise UserError(f"there is no experiment {name!r}", expected=", ".join(EXPERIMENTS))
    module, function, _ = EXPERIMENTS[name]
    run: Callable[[Subject, Effort], Finding] = getattr(
        import_module(f"pipeline.lenses.paper.{module}"), function
    )
    return run(subject, effort)


def write_finding(finding: Finding, folder: Path) -> None:
    """Write the tables as Parquet, the figure, and the text."""
    for name, table in finding.tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
    finding.draw(folder / FIGURE)
    (folder / REPORT).write_text(finding.text + "\n", encoding="utf-8")
