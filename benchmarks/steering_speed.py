"""What steering costs: a steered forward pass against an unsteered one, `python -m benchmarks.steering_speed`.

A plan over every layer, once adding (no encoder) and once as a closed loop, with threshold and TopK dictionaries of
random rows (speed does not depend on what they mean). Prefill: 8 × 128 tokens; decoding: 16 rows, one token a step.
Steered and unsteered passes alternate; one JSON line a case with the median of the paired ratios and their range.
Claim: at most 1.3× where the architecture lets selected columns be computed alone; TopK must see all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from data.language_model import LanguageModel, Packaged, Random
from data.sites import Site
from sae import Sae, Threshold, TopKActivation
from steering.applied import applied
from steering.edits import Add, Floor
from steering.plan import Node, Plan


def main() -> None:
    """Measure every case."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    spec = Random(n_layers=4, d_model=64, n_heads=4) if arguments.tiny else Packaged()
    model = LanguageModel.open(spec)
    for name, edit, k in (("add", Add(), 0), ("floor, threshold", Floor(), 0), ("floor, topk 32", Floor(), 32)):
        saes = _dictionaries(model, arguments.latents, k)
        plan = Plan(
            nodes=tuple(Node(at=f"{site.short}/{7 + site.layer}", scale=1.0) for site in saes), edit=edit, strength=0.5
        )
        for phase, run in (("prefill", _prefill(model)), ("decode", _decode(model))):
            found = _compare(model, saes, plan, run, arguments.pairs)
            print(json.dumps({"case": name, "phase": phase, "n_layers": model.n_layers, **found}))


def _compare(
    model: LanguageModel, saes: dict[Site, Sae], plan: Plan, run: Callable[[], float], pairs: int
) -> dict[str, float]:
    ratios, plain_seconds = [], []
    run()
    for _ in range(pairs):
        plain = run()
        with applied(model, saes, plan):
            steered = run()
        ratios.append(steered / plain)
        plain_seconds.append(plain)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "unsteered_seconds": round(statistics.median(plain_seconds), 4),
        "pairs": pairs,
    }


def _prefill(model: LanguageModel) -> Callable[[], float]:
    ids = torch.randint(0, model.d_vocab, (8, 128), generator=torch.Generator().manual_seed(0))

    def run() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.hf(input_ids=ids, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - started

    return run


def _decode(model: LanguageModel, *, n_steps: int = 8) -> Callable[[], float]:
    """Steps after a short prompt; the prompt's pass is not timed."""
    ids = torch.randint(0, model.d_vocab, (16, 16), generator=torch.Generator().manual_seed(1))

    def run() -> float:
        with torch.no_grad():
            cache = model.hf(input_ids=ids, use_cache=True).past_key_values
            started = time.perf_counter()
            for _ in range(n_steps):
                cache = model.hf(input_ids=ids[:, :1], past_key_values=cache).past_key_values
        return time.perf_counter() - started

    return run


def _dictionaries(model: LanguageModel, n_latents: int, k: int) -> dict[Site, Sae]:
    found = {}
    for layer in range(model.n_layers):
        rows = torch.randn(n_latents, model.d_model, generator=torch.Generator().manual_seed(layer))
        rows = rows / rows.norm(dim=-1, keepdim=True)
        activation = TopKActivation(k=k) if k else Threshold(theta=torch.full((n_latents,), 0.5))
        zeros = torch.zeros(model.d_model)
        found[Site(layer, "resid_post")] = Sae(
            W_enc=rows, b_enc=torch.zeros(n_latents), W_dec=rows, b_dec=zeros, b_in=zeros, activation=activation
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    return parser


if __name__ == "__main__":
    main()
