"""SAELens' `CacheActivationsRunner`, timed. Runs in SAELens' environment;
benchmarks/store_saelens.py drives it.

    python collect_saelens.py --model FOLDER --tokens FILE.npy --batch 8 --dtype bfloat16 --threads
    2

The model is loaded once. Then every line on standard input, `{"site": "model.layers.14", "out":
FOLDER}`, caches that site for all tokens into a new folder, as `CacheActivationsRunner.run` does,
and answers with a line of JSON: seconds. SAELens stores float32, which is its default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, __version__


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--tokens", type=Path, required=True, help=".npy of ids, [context, position]"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-site", default="model.layers.0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    ids = np.load(options.tokens)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with contextlib.redirect_stdout(sys.stderr):
        runner = CacheActivationsRunner(
            settings(options, ids, options.first_site, "unused"), override_dataset=as_dataset(ids)
        )
        answers.write(json.dumps({"ready": __version__}) + "\n")
        for line in sys.stdin:
            task = json.loads(line)
            answers.write(
                json.dumps({"seconds": seconds_to_cache(runner.model, options, ids, **task)}) + "\n"
            )


def seconds_to_cache(
    model: object, options: argparse.Namespace, ids: np.ndarray, *, site: str, out: str
) -> float:
    """One whole run; the model is there already, as it would be the second time in a session."""
    made = CacheActivationsRunner.__new__(CacheActivationsRunner)
    with_model(made, model, settings(options, ids, site, out), as_dataset(ids))
    started = time.perf_counter()
    made.run()
    return time.perf_counter() - started


def with_model(
    runner: CacheActivationsRunner,
    model: object,
    config: CacheActivationsRunnerConfig,
    dataset: Dataset,
) -> None:
    """What `CacheActivationsRunner.__init__` does, but with a model that is loaded."""
    import sae_lens.cache_activations_runner as module

    original = module.load_model
    module.load_model = lambda **choices: model
    try:
        runner.__init__(config, override_dataset=dataset)
    finally:
        module.load_model = original


def settings(
    options: argparse.Namespace, ids: np.ndarray, site: str, out: str
) -> CacheActivationsRunnerConfig:
    """Two buffers for all the tokens, so that the runner's own splitting is in the measurement."""
    from transformers import AutoConfig

    width = AutoConfig.from_pretrained(options.model).hidden_size
    return CacheActivationsRunnerConfig(
        dataset_path="the given tokens",
        model_name=options.model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": getattr(torch, options.dtype)},
        model_batch_size=options.batch,
        hook_name=site,
        d_in=width,
        training_tokens=ids.size,
        context_size=ids.shape[1],
        new_cached_activations_path=out,
        shuffle=False,
        device="cpu",
        buffer_size_gb=ids.size // 2 * width * 4 / 1e9 + 1e-9,
        prepend_bos=False,
        streaming=False,
    )


def as_dataset(ids: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist()})


if __name__ == "__main__":
    main()
