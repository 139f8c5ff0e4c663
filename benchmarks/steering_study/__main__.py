"""The steering study on a finished run: `python -m benchmarks.steering_study artifacts/laptop`.

Reads the artifacts collect, train and link; keeps its results in `<artifacts>/steering-study`,
where an interrupted run goes on; writes the report. `--topics 4` shows that it runs, the default of
14 supports a claim. `--estimate` only says what it would cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path

import torch

from benchmarks.steering_study.report import write_report
from benchmarks.steering_study.study import Study, StudyOptions, cost_of
from data.concepts.topics import read_topics
from pipeline.context import RunContext
from pipeline.run import Run
from steering.hooks import NothingTouched


def main() -> None:
    """Develop, lock, test, report."""
    arguments = _parser().parse_args()
    topics = tuple(read_topics())[: arguments.topics]
    options = StudyOptions(
        topics=topics,
        n_dev_prompts=arguments.dev_prompts,
        n_test_prompts=arguments.test_prompts,
        n_tokens=arguments.tokens,
        seed=arguments.seed,
    )
    cost = cost_of(options)
    print(
        f"{len(topics)} topics: about {cost['generated']:,} tokens generated, {cost['scored']:,} "
        "scored"
    )
    if arguments.estimate:
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter(
        "ignore", NothingTouched
    )  # suppression that finds nothing to suppress is an outcome here
    context = RunContext(device=arguments.device)
    steering = Run.open(arguments.artifacts, context=context).steering
    study = Study(
        steering=steering,
        options=options,
        folder=arguments.folder or arguments.artifacts / "steering-study",
        made_from={"model": steering.model.fingerprint, **steering.digests},
        progress=lambda label, done, total: print(
            f"{time.strftime('%H:%M:%S')} {label} {done}/{total}", flush=True
        ),
    )
    study.develop()
    study.lock()
    study.test()
    chosen = ", ".join(
        f"{name} {value}" for name, value in dataclasses.asdict(options).items() if name != "topics"
    )
    run = arguments.artifacts.name
    about = (
        f"Written by `python -m benchmarks.steering_study artifacts/{run}`. Model "
        f"{steering.model.name}, dictionaries "
        f"of the recipe `{run}`. Topics: {', '.join(topics)}. Options: {chosen}."
    )
    print(write_report(study.folder, arguments.report, seed=arguments.seed, about=about))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "artifacts", type=Path, help="folder of a finished run, with collect, train and link"
    )
    parser.add_argument("--topics", type=int, default=14, help="how many topics")
    parser.add_argument("--dev-prompts", type=int, default=12)
    parser.add_argument("--test-prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24, help="tokens a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", type=Path, default=Path("docs/steering-study.md"))
    parser.add_argument("--folder", type=Path, help="results; default: <artifacts>/steering-study")
    parser.add_argument("--estimate", action="store_true", help="only print the cost")
    return parser


if __name__ == "__main__":
    main()
