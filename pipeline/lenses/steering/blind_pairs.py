"""The steer artifact's texts before a language model: pairs drawn by the seed, rated blind, one
table of verdicts.

The judge sees the concept (the feature's top tokens), the opening and the text; not whether it was
steered. Both texts of a pair are asked about, in an order drawn by the seed. Paired differences use
the pairs whose answers all were read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from featureflow.errors import Command, UserError
from featureflow.progress import Progress, silent
from featureflow.statistics import bootstrap_mean
from pipeline.lenses.steering.judge import (
    RUBRICS,
    Judge,
    Judged,
    Rubric,
    Verdict,
    readable_share,
    spread,
)


def judge_artifact(
    folder: Path,
    judge: Judge,
    rubric_name: str,
    *,
    arm: str,
    n_pairs: int,
    seed: int,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Two rows a pair: unsteered and steered. Raises UserError for an artifact without such
    texts."""
    samples, concepts = _texts(folder, arm)
    generator = np.random.default_rng(seed)
    drawn = samples.iloc[np.sort(generator.permutation(len(samples))[:n_pairs])]
    asked = [
        (pair, side, row)
        for pair, row in enumerate(drawn.to_dict(orient="records"))
        for side in ("unsteered", "steered")
    ]
    asked = [asked[place] for place in generator.permutation(len(asked))]
    texts = [
        Judged(concept=concepts[r["feature"]], prompt=r["prompt"], text=r[s]) for _, s, r in asked
    ]
    verdicts = judge.judge(RUBRICS[rubric_name], texts, progress=progress)
    rows = [
        _row(pair, side, row, each) for (pair, side, row), each in zip(asked, verdicts, strict=True)
    ]
    return pd.DataFrame(rows).sort_values(["pair", "side"], ignore_index=True)


def _texts(folder: Path, arm: str) -> tuple[pd.DataFrame, dict[str, str]]:
    needed = [folder / name for name in ("samples.parquet", "features.json", "choice.json")]
    if missing := [path.name for path in needed if not path.is_file()]:
        raise UserError(
            "no texts to judge",
            where=str(folder),
            expected=", ".join(missing),
            fix=Command("run", to="steer"),
        )
    dose = json.loads(needed[2].read_text(encoding="utf-8"))["dose"]
    records = json.loads(needed[1].read_text(encoding="utf-8"))["features"]
    samples = pd.read_parquet(needed[0])
    arms = sorted(samples["arm"].unique())
    if arm not in arms:
        raise UserError(f"no texts of the arm {arm!r}", where=str(folder), expected=", ".join(arms))
    concepts = {
        r["feature"]: ", ".join(dict.fromkeys(t.strip() for t in r["top_tokens"]))[:200]
        for r in records
    }
    return samples[(samples["arm"] == arm) & (samples["target"] == dose)], concepts


def _row(pair: int, side: str, row: dict, verdict: Verdict) -> dict:
    return {
        "pair": pair,
        "side": side,
        "feature": row["feature"],
        "prompt": row["prompt"],
        "text": row[side],
        "total": verdict.total,
        **{f"rating_{name}": verdict.ratings.get(name) for name in verdict.answers},
        **{f"answer_{name}": answer for name, answer in verdict.answers.items()},
    }


def verdict_lines(table: pd.DataFrame, rubric_name: str) -> Iterator[str]:
    """What was read of the answers, whether ratings differ between texts, and the paired
    difference."""
    rubric = RUBRICS[rubric_name]
    verdicts = [_verdict(row, rubric) for row in table.to_dict(orient="records")]
    shares, different = readable_share(rubric, verdicts), spread(rubric, verdicts)
    yield f"answers that could be read, of {len(table)} texts: " + ", ".join(
        f"{k} {v:.0%}" for k, v in shares.items()
    )
    yield "different ratings given: " + ", ".join(f"{name} {n}" for name, n in different.items())
    if alike := [name for name, n in different.items() if n == 1 and len(verdicts) > 2]:
        yield (
            f"the judge rates every text alike in {', '.join(alike)}: it does not tell texts "
            "apart there"
        )
    totals = table.pivot(index="pair", columns="side", values="total").dropna().astype(float)
    if totals.empty:
        yield "no pair has both totals: nothing can be said about steering"
        return
    found = bootstrap_mean(
        list(totals["steered"] - totals["unsteered"]), [list(totals.index)], seed=0
    )
    yield (
        f"{rubric.name} total over {len(totals)} pairs: unsteered "
        f"{totals['unsteered'].mean():.3f}, "
        f"steered {totals['steered'].mean():.3f}, difference {found.mean:+.3f} [{found.low:+.3f}, "
        f"{found.high:+.3f}]"
    )


def _verdict(row: dict, rubric: Rubric) -> Verdict:
    read = {q.name: row[f"rating_{q.name}"] for q in rubric.questions}
    return Verdict(
        ratings={
            name: int(value)
            for name, value in read.items()
            if value is not None and not pd.isna(value)
        },
        answers={q.name: row[f"answer_{q.name}"] for q in rubric.questions},
        total=None if pd.isna(row["total"]) else float(row["total"]),
    )
