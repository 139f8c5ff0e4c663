"""A run's artifacts in, the tables of measured results out: nothing in them is typed by hand.

    python -m benchmarks.headline artifacts/laptop            print the whole table
    python -m benchmarks.headline artifacts/laptop --write    put it into docs/results.md, and its
                                                              first lines into README.md, between
                                                              the two marks of each page

Every number is read from a manifest or a table of the run. Figures of the papers that stand beside
them are constants with their source.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from pipeline.artifact import Artifact
from pipeline.lenses.base import fitting
from pipeline.run import Run
from pipeline.stages import STAGES, StageName

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- measured: begin (python -m benchmarks.headline) -->", "<!-- measured: end -->"
PAPER_SUCCESS, PAPER_CHANGE = 0.65, 0.75  # arXiv 2502.03032, Table 1, Gemma-2-2B
Row = tuple[str, str, str, str]


def main() -> None:
    """Print the table, or write it into the two pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--write", action="store_true", help="replace the tables in the pages")
    parser.add_argument("--readme", type=Path, default=README, help="the page with few rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page with all rows")
    options = parser.parse_args()
    if not options.write:
        print(report(options.run))
        return
    pages = {options.readme: short_report(options.run), options.results: report(options.run)}
    for page, text in pages.items():
        old = page.read_text(encoding="utf-8")
        if old.count(BEGIN) != 1 or old.count(END) != 1:
            parser.error(f"{page} must hold {BEGIN} and {END} once each")
        before, rest = old.split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def report(run: Path) -> str:
    """The times of all stages in a sentence, then the table."""
    seconds = {stage: _seconds(run, stage) for stage in STAGES if (run / stage).is_dir()}
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e9
    lines = [
        f"{times}: {sum(seconds.values()) / 60:.1f} minutes altogether; {size:.1f} GB of disk.",
        "",
    ]
    lines += ["| what | here | baseline | command |", "|---|---|---|---|"]
    lines += [
        f"| {what} | {here} | {baseline} | `{command}` |"
        for what, here, baseline, command in rows(run)
    ]
    return "\n".join(lines)


def short_report(run: Path) -> str:
    """The first row of every kind of result."""
    kinds = (_evaluate_rows, _link_rows, _ceiling_rows, _causal_rows, _label_rows, _steer_rows)
    first = [row for kind in kinds for row in [next(kind(run), None)] if row]
    lines = ["| what | here | baseline |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {what} | {here} | {baseline} |" for what, here, baseline, _ in first]
    )


def rows(run: Path) -> Iterator[Row]:
    """The rows of the table, stage by stage."""
    yield from _evaluate_rows(run)
    yield from _link_rows(run)
    yield from _ceiling_rows(run)
    yield from _control_rows(run)
    yield from _causal_rows(run)
    yield from _label_rows(run)
    yield from _steer_rows(run)


def _label_rows(run: Path) -> Iterator[Row]:
    """What holds on the documents that chose no label; intervals where the lens looked."""
    need = _open(run, "describe").config["min_f1"]
    what = f"Living features with a label that holds on documents that chose nothing (F1 ≥ {need:g}"
    if not (run / "lenses" / "labels").is_dir():
        features = pd.read_parquet(run / "describe" / "tables" / "features.parquet")
        accepted = features[features.alive].label_accepted
        holding = (accepted & (features.label_score >= need)).sum() / accepted.size
        baseline = f"accepted on the documents that chose: {accepted.mean():.0%}"
        yield (f"{what})", f"**{holding:.0%}**", baseline, "make describe")
        return
    found = Run.open(run).lens("labels").tables
    summary = found["summary"].set_index(["sites", "about"])
    named = {name: name for name in summary.index.unique("sites")} | {"all": "all sites"}
    for about in summary.index.unique("about"):
        rows = {name: summary.loc[(name, about)] for name in named}
        told = "; ".join(
            f"{named[name]} **{row.holding_share:.1%}** "
            f"[{row.holding_share_low:.1%}, {row.holding_share_high:.1%}]"
            for name, row in rows.items()
        )
        control = f"the rule of another feature of the site: {rows['all'].control_share:.1%}"
        baseline = f"accepted on the documents that chose: {rows['all'].accepted_share:.1%}"
        yield (f"{what}; {about})", told, f"{baseline}; {control}", "featureflow lens labels")
    kinds = found["kinds"].sort_values("n_holding", ascending=False)
    told = ", ".join(
        f"{row.rule} {row.n_holding} of {row.n_accepted}" for row in kinds.itertuples()
    )
    yield ("… by kind of rule: held of accepted", told, "", "featureflow lens labels")


def _ceiling_rows(run: Path) -> Iterator[Row]:
    """What two seeds of one layer agree by, where the lens looked."""
    if not (run / "lenses" / "seed-ceiling").is_dir():
        return
    sites = Run.open(run).lens("seed-ceiling").tables["sites"]
    yield (
        "Two seeds of one layer, correlation of each feature with its best match, kept or not "
        f"(median of {len(sites)} sites): the ceiling of best sources",
        f"**{sites.correlation.median():.2f}**; found twice: "
        f"{sites.replicating_share.median():.0%} of living features",
        f"best sources in the layer before, at these sites: {sites.link_correlation.median():.2f}; "
        f"chance, 99th percentile: {sites.chance_p99.median():.2f}",
        "featureflow lens seed-ceiling",
    )


def _control_rows(run: Path) -> Iterator[Row]:
    """What the judge keeps where there is nothing to find, where the lens looked."""
    if not (run / "lenses" / "link-controls").is_dir():
        return
    shares = Run.open(run).lens("link-controls").tables["summary"].set_index("control").kept_share
    told = "; ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "forward")
    yield (
        "Targets with a kept link under each control, 5 % false-discovery rate (clear partners "
        "should be kept; orphans, permuted tokens and later modules should not)",
        told,
        f"the pairs as they are: {shares['forward']:.1%}",
        "featureflow lens link-controls",
    )


def _evaluate_rows(run: Path) -> Iterator[Row]:
    metrics = pd.read_parquet(run / "lenses" / "reconstruction" / "tables" / "metrics.parquet")
    better = int((metrics.fvu < metrics.pca_fvu).sum())
    yield (
        f"Variance unexplained (FVU) at {metrics.l0.median():.0f} latents a token, median of "
        f"{len(metrics)} "
        "dictionaries, held-out documents",
        f"**{metrics.fvu.median():.3f}**",
        f"PCA with as many components: {metrics.pca_fvu.median():.3f}; better at {better} of "
        f"{len(metrics)} sites{_untrained(metrics)}",
        "make evaluate",
    )
    losses = pd.read_parquet(run / "lenses" / "loss-recovered" / "tables" / "losses.parquet")
    spliced = losses.dropna(subset=["ce_recovered_zero"])
    yield (
        "Next-token loss recovered when the model reads the reconstruction, median of "
        f"{len(spliced)} sites",
        f"**{spliced.ce_recovered_zero.median():.3f}** against zero ablation, "
        f"{spliced.ce_recovered_mean.median():.3f} against mean",
        "0 and 1 by definition",
        "make evaluate",
    )


def _untrained(metrics: pd.DataFrame) -> str:
    """The baseline of train rows as a dictionary, where the lens has it."""
    if "rows_fvu" not in metrics:
        return ""
    better = int((metrics.fvu < metrics.rows_fvu).sum())
    return (
        f"; 2,048 train rows as a dictionary, as many a token: {metrics.rows_fvu.median():.3f}; "
        f"better at {better}"
    )


def _link_rows(run: Path) -> Iterator[Row]:
    pairs = pd.read_parquet(run / "link" / "pairs.parquet")
    residual = pairs[pairs.relation == "residual"]
    yield (
        "Activations of linked neighbours (kept links), correlation on held-out tokens, median",
        f"**{residual.pearson_median_kept.median():.2f}**",
        f"each feature's best source, kept or not: {residual.pearson_median.median():.2f}; "
        f"its best partner by correlation: {residual.pearson_best_median.median():.2f}; "
        f"chance, 99th percentile: {residual.pearson_chance_p99.median():.2f}",
        "make link",
    )
    kept = pairs.groupby("relation")[["n_targets", "n_links", "n_above_fixed"]].sum()
    share, fixed = kept.n_links / kept.n_targets, kept.n_above_fixed / kept.n_targets
    same = (residual.start == "same_start").any()
    yield (
        "Residual features linked to the layer before"
        + (" (of one start: not discovered)" if same else "")
        + ", 5 % false-discovery rate",
        f"**{share['residual']:.0%}**",
        f"the paper's cosine ≥ 0.5 would pass {fixed['residual']:.1%}; of the links, "
        f"{residual.n_same_number.sum() / residual.n_targets.sum():.1%} join latents of the same "
        "number",
        "make link",
    )
    if {"mlp", "attention"} <= set(share.index):
        yield (
            "Residual features with a predecessor in their layer's MLP / attention, 5 % "
            "false-discovery rate",
            f"**{share['mlp']:.0%} / {share['attention']:.0%}**",
            f"the paper's cosine ≥ 0.15 would pass {fixed['mlp']:.0%} / {fixed['attention']:.0%}",
            "make link",
        )


def _causal_rows(run: Path) -> Iterator[Row]:
    """Nothing where the recipe tests no links in the model."""
    if not (run / "link" / "causal_summary.parquet").is_file():
        return
    table = pd.read_parquet(run / "link" / "causal_summary.parquet")
    by = table[table.relation == "residual"].set_index("strategy")
    by_pair = pd.read_parquet(run / "link" / "causal_by_pair.parquet")
    n_pairs = by_pair[by_pair.relation == "residual"].target.nunique()

    def interval(strategy: str, what: str) -> str:
        row = by.loc[strategy]
        return f"{row[what]:.2f} [{row[what + '_low']:.2f}, {row[what + '_high']:.2f}]"

    others = {name: by.loc[name] for name in ("random active", "strongest active")}
    top = by.loc["top-1"]
    yield (
        f"Removing the top-1 predecessor silences the target ({n_pairs} layer pairs over the "
        f"depth; {int(top.n)} tests of {int(top.n_targets)} targets; 95 % interval over documents)",
        f"with the model {interval('top-1', 'success')}, without it "
        f"{interval('top-1', 'success_no_model')}: what the model adds is "
        f"**{interval('top-1', 'success_by_model')}**; of all targets {top.success_all:.2f}",
        f"another active latent: {others['random active'].success:.2f}; the strongest other: "
        f"{others['strongest active'].success:.2f}; the paper, Gemma-2-2B, without that arm: "
        f"{PAPER_SUCCESS}",
        "make link",
    )
    yield (
        "… and lowers its activation by",
        f"{interval('top-1', 'change')} with, {interval('top-1', 'change_no_model')} without: "
        f"**{interval('top-1', 'change_by_model')}**",
        f"{others['random active'].change:.2f}; {others['strongest active'].change:.2f}; the "
        f"paper: {PAPER_CHANGE}",
        "make link",
    )


def _steer_rows(run: Path) -> Iterator[Row]:
    """One row a feature at the dose that was chosen on other prompts, every feature: none is left
    out. None without the stage."""
    if not (run / "steer").is_dir():
        return
    effects = pd.read_parquet(run / "steer" / "tables" / "effects.parquet")
    dose = float(_open(run, "steer").summary["dose"])
    at_dose = effects[effects.target == dose].set_index(["feature", "arm", "measure"]).sort_index()
    for feature in effects.feature.unique():

        def shown(arm: str, measure: str, chosen: str = feature) -> str:
            row = at_dose.loc[(chosen, arm, measure)]
            return f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"

        coherent = at_dose.loc[(feature, "flow", "coherent")]
        yield (
            f"Steering `{feature}` along its flow at {dose:g} nats: its top tokens in 100 tokens "
            "of continuations of neutral prompts, against the paired unsteered samples",
            f"**{shown('flow', 'top_tokens')}**; coherent {coherent.steered:.0%} (unsteered "
            f"{coherent.unsteered:.0%})",
            f"one layer, same dose: {shown('single', 'top_tokens')}; a random feature's flow: "
            f"{shown('random_flow', 'top_tokens')}",
            "make steer",
        )


def _seconds(run: Path, stage: str) -> float:
    """How long a stage took; of the lenses, all that fit together."""
    made = [*fitting(Run.open(run)).values()] if stage == "lenses" else [_open(run, stage)]
    return sum(float(artifact.made_by["seconds"]) for artifact in made)


def _open(run: Path, stage: str) -> Artifact:
    """A stage's artifact, refused if it is incomplete or of another schema."""
    return Artifact.open(run / stage, kind=stage, schema=StageName(stage).module.SCHEMA)


if __name__ == "__main__":
    main()
