"""The scorecard of worlds over starts, architectures, matchers and seeds, and of untrained models.

    python -m benchmarks.world_scores compiled --starts independent shared chain --seeds 3

For each world the activations are collected once. Each choice is trained, linked and scored by the
lens `world-score` with every seed; a cell is the mean over seeds with a bootstrap interval over
them. Writes `scores.jsonl` into the output folder, which a second call goes on from, and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureflow.statistics import bootstrap_mean
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.lenses import world_score
from pipeline.run import Run
from pipeline.stages import collect, link, train
from pipeline.stages.recipe import read_recipe

STARTS: Mapping[str, dict[str, Any]] = {
    "independent": {"kind": "independent"},
    "shared": {"kind": "shared"},
    "chain": {"kind": "chain", "next_steps": 100, "module_steps": 300},
}
COLUMNS = {
    "f1": "F1",
    "set_f1": "F1 of sets",
    "f1_permuted": "F1, permuted truth",
    "unexplained": "latents without a fact",
    "link_recall": "link recall",
    "link_false_share": "false links",
    "birth_right": "births right",
    "birth_too_early": "births too early",
    "death_right": "deaths right",
    "probe_right": "probes right",
    "remove_own": "removing changes it",
    "exchange_own": "exchanging sets it",
    "exchange_others": "others change",
    "steered_legal": "steered legal",
    "unsteered_legal": "unsteered legal",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One row of the table."""

    world: str
    weights: str
    start: str
    architecture: str
    matcher: str
    null: str

    @property
    def name(self) -> str:
        return ", ".join(each for each in vars(self).values())


def main() -> None:
    """Score what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("worlds", nargs="+", help="worlds, as in configs/world-NAME.toml")
    parser.add_argument("--starts", nargs="+", default=["independent"], choices=list(STARTS))
    parser.add_argument("--architectures", nargs="+", default=["topk"])
    parser.add_argument("--matchers", nargs="+", default=["cosine"])
    parser.add_argument("--nulls", nargs="+", default=["automatic"])
    parser.add_argument("--weights", nargs="+", default=["shipped"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=None, help="of training; none for the recipe's"
    )
    parser.add_argument("--out", type=Path, default=Path("artifacts/world-scores"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for choice in _choices(options):
        for seed in range(options.seeds):
            rows.append(_scored(choice, seed, options.out, options.steps))
            print(choice.name, seed, rows[-1]["scores"], flush=True)
    print(_table(rows))


def _choices(options: argparse.Namespace) -> Iterator[Choice]:
    lists = (options.worlds, options.weights, options.starts, options.architectures)
    for values in itertools.product(*lists, options.matchers, options.nulls):
        yield Choice(**dict(zip(Choice.__dataclass_fields__, values, strict=True)))


def _scored(choice: Choice, seed: int, out: Path, steps: int | None) -> dict[str, Any]:
    """The headline of one run; one that is in the file already is taken from there."""
    file, key = out / "scores.jsonl", {**vars(choice), "seed": seed, "steps": steps}
    for line in file.read_text().splitlines() if file.is_file() else ():
        if (found := json.loads(line))["key"] == key:
            return found
    configs, context = read_recipe(f"world-{choice.world}").configs, RunContext(n_threads=1)
    model = {"kind": "world", "world": {"kind": choice.world}, "weights": choice.weights}
    asked = configs["collect"].model_dump(mode="json") | {"model": model}
    collected = _stage(collect, asked, {}, out / choice.world / choice.weights / "collect", context)
    root = out / choice.world / choice.weights / f"{choice.start}-{choice.architecture}-{seed}"
    asked = configs["train"].model_dump(mode="json")
    architecture = {"kind": choice.architecture, "k": asked["architecture"]["k"]}
    asked |= {"architecture": architecture, "initialisation": STARTS[choice.start], "seed": seed}
    asked |= {"steps": steps} if steps else {}
    trained = _stage(train, asked, {"collect": collected}, root / "train", context)
    asked = configs["link"].model_dump(mode="json") | {"matcher": choice.matcher}
    asked |= {"null": {"kind": choice.null}}
    made = {"collect": collected, "train": trained}
    linked = _stage(link, asked, made, root / f"link-{choice.matcher}-{choice.null}", context)
    run = Run.of({**made, "link": linked}, context=context)
    finding = world_score.look(run, world_score.Config(seed=seed))
    scores = dict(finding.headline)
    for row in finding.tables["rules"].to_dict(orient="records"):
        scores |= {f"{row['rule']}, {name}": row[name] for name in ("recall", "false_share")}
    saes = [run.saes.description(site)["metadata"]["held_out_fvu"] for site in run.saes]
    found = {"key": key, "scores": {**scores, "fvu": sum(saes) / len(saes)}}
    with file.open("a") as lines:
        lines.write(json.dumps(found) + "\n")
    return found


def _stage(
    stage: Any,
    asked: dict[str, Any],
    inputs: Mapping[str, Artifact],
    out: Path,
    context: RunContext,
) -> Artifact:
    config = stage.Config.model_validate_json(json.dumps(asked))
    if (out / "manifest.json").is_file():
        return Artifact.open(out, kind=stage.KIND, schema=stage.SCHEMA)
    out.parent.mkdir(parents=True, exist_ok=True)
    return stage.run(config, stage.Inputs(**inputs), out, context)


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(_name(row) for row in rows))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rules = {name: name for row in rows for name in row["scores"] if ", " in name}
    for column, title in {"fvu": "FVU", **COLUMNS, **rules}.items():
        cells = []
        for name in names:
            values = [row["scores"].get(column) for row in rows if _name(row) == name]
            known = [float(value) for value in values if value is not None]
            found = bootstrap_mean(known, seed=0)
            cells.append(f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" if known else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(row: Mapping[str, Any]) -> str:
    return ", ".join(
        str(value) for name, value in row["key"].items() if name not in ("seed", "steps")
    )


if __name__ == "__main__":
    main()
