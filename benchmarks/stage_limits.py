"""How near the central loop of each stage comes to what the processor can multiply, `python -m
benchmarks.stage_limits`.

1. The limits: large products in float32 and bfloat16, one thread, the best of some repeats.
2. A small piece of each stage's loop on the packaged model's sizes, timed in processor seconds
   after one untimed repeat: collect (a forward pass that keeps every site), train (a step), link
   (codes of rows, and matching), describe (the survey's encoder), steer (generation).
3. `share` is the time that the piece's products alone would take at their limit, over the time it
   took. 1 is the limit; what is missing goes to everything that is not a product.

Cost: about a minute of one core. `--tiny` takes a small random model. The times of whole stages are
printed by `featureflow run`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from data.model.language_model import LanguageModel, Packaged, Random
from featureflow.sites import Site
from pipeline.describe.encoder import Encoder
from pipeline.flow.directions import sae_directions
from pipeline.flow.functional import encode_tokens
from pipeline.flow.match import match
from sae import Sae
from sae.activations import TopKActivation
from sae.architectures import TopK
from sae.batches import Batch
from sae.kernels.memory import kept_memory
from sae.kernels.select import has_fast_bfloat16
from sae.normalisation import Normalisation
from sae.schedule import schedule_of
from sae.step import Precision
from sae.trainer import Trainer, random_start
from steering.generation import Sampling, generate

Piece = tuple[str, str, Precision, float, Callable[[], object]]
"""Stage, what is timed, dtype of its products, their floating-point operations, and the call."""


def main() -> None:
    """Print the limits, then a line a piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with kept_memory():
        limits = {dtype: _limit(dtype) for dtype in ("float32", "bfloat16")}
        print(json.dumps({f"{name}_gflops": round(rate / 1e9, 1) for name, rate in limits.items()}))
        for stage, what, dtype, work, call in _pieces(options.tiny, options.latents):
            seconds = _best(call, options.repeats)
            share = work / limits[dtype] / seconds
            numbers = {"gflop": round(work / 1e9, 2), "cpu_s": round(seconds, 4)}
            found = {
                "stage": stage,
                "what": what,
                "dtype": dtype,
                **numbers,
                "share": round(share, 3),
            }
            print(json.dumps(found), flush=True)


def _limit(dtype: str, n: int = 2048) -> float:
    """Floating-point operations a second of a square product."""
    a = torch.randn(n, n).to(getattr(torch, dtype))
    return 2 * n**3 / _best(lambda: a @ a.T, 4)


def _best(call: Callable[[], object], repeats: int) -> float:
    """Processor seconds of the fastest repeat; the first, which compiles and fills caches, is not
    timed."""
    call()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def _pieces(tiny: bool, n_latents: int) -> Iterator[Piece]:
    spec = Random(n_layers=2, d_model=64, n_heads=4, d_mlp=128, d_vocab=512) if tiny else Packaged()
    model = LanguageModel.open(spec)
    a_token = _operations_of_a_token(model)
    ids = torch.randint(0, min(model.d_vocab, 512), (8, 128))
    yield (
        "collect",
        "forward pass, every site",
        "bfloat16",
        a_token * ids.numel(),
        lambda: model.activations(ids, model.sites()),
    )
    d, k, generator = model.d_model, 32, torch.Generator().manual_seed(0)
    x = torch.randn(4096, 48, generator=generator) @ torch.randn(48, d, generator=generator)
    product = 2.0 * d * n_latents
    precision: Precision = "bfloat16" if has_fast_bfloat16() else "float32"
    trainer, batch = _trainer(d, n_latents, k, precision), Batch(x=x[:1024])
    yield "train", "step of 1,024 rows", precision, 1024 * product, lambda: trainer.train_on(batch)
    weights = random_start(n_latents, d, seed=0)
    sae = Sae(
        W_enc=weights["W_enc"],
        b_enc=weights["b_enc"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        b_in=torch.zeros(d),
        activation=TopKActivation(k=k),
    )
    directions = sae_directions(sae, name="L0")
    yield "link", "codes", "float32", len(x) * product, lambda: encode_tokens(sae, [x])
    yield (
        "link",
        "match",
        "float32",
        n_latents * product,
        lambda: match(directions, directions, k=2),
    )
    encoder, rows, values = Encoder.of(sae, "bfloat16"), np.arange(len(x)), x.numpy()
    yield (
        "describe",
        "encoder",
        "bfloat16",
        len(x) * product,
        lambda: encoder.activations(values, rows),
    )
    nothing: dict[Site, Sae] = {}
    prompts, sampling = ["The "] * 8, Sampling(n_tokens=8)
    yield (
        "steer",
        "72 unsteered samples of 8 tokens",
        "bfloat16",
        72 * 8 * (a_token + 2.0 * d * model.d_vocab),
        lambda: generate(
            model, nothing, prompts, [None], n_samples=9, sampling=sampling, batch_size=72
        ),
    )


def _operations_of_a_token(model: LanguageModel) -> float:
    """Of the products with weights of the blocks; attention comes to little at this length."""
    linear = (m for m in model.hf.base_model.modules() if isinstance(m, torch.nn.Linear))
    return 2.0 * sum(module.weight.numel() for module in linear)


def _trainer(d: int, n_latents: int, k: int, precision: Precision) -> Trainer:
    architecture = TopK(k=k)
    return Trainer(
        architecture=architecture,
        schedule=schedule_of(steps=10_000, learning_rate=1e-3, batch_size=1024),
        weights=architecture.prepared(random_start(n_latents, d, seed=0)),
        source=Normalisation(mean=torch.zeros(d), scale=1.0),
        precision=precision,
    )


if __name__ == "__main__":
    main()
