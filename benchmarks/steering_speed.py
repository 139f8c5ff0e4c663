"""What steering costs: a steered forward pass against an unsteered one, `python -m
benchmarks.steering_speed`.

A plan over every layer, once adding (no encoder) and once as a closed loop, with threshold and TopK
dictionaries of random rows and, where a run of the demo lies in `artifacts/laptop`, with its
trained ones: how many columns TopK must see depends on what they mean (sae/selected.py). Their
latents are drawn among those that fire on the text. Prefill: 8 × 128 tokens of text; decoding: 16
rows, one token a step. Steered and unsteered passes alternate; one JSON line a case with the median
of the paired ratios and their range. `product only` and `encode only` are the same passes with a
hook at every site that does nothing else: what a plan cannot go below that multiplies all columns,
and that selects in every row. Claim: at most 1.3×.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from data.concepts.prompts import read_prompts
from data.model.language_model import LanguageModel, Packaged, Random
from featureflow.sites import Site
from sae import Sae, Threshold, TopKActivation, load_sae
from steering.edits import Add, Edit, Floor
from steering.hooks import applied
from steering.plan import Node, Plan


def main() -> None:
    """Measure every case."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    spec = Random(n_layers=4, d_model=64, n_heads=4) if arguments.tiny else Packaged()
    model = LanguageModel.open(spec)
    ids = _text(model)
    for name, steered in _cases(model, arguments, ids).items():
        for phase, run in (("prefill", _prefill(model, ids)), ("decode", _decode(model, ids))):
            found = _compare(run, steered, arguments.pairs)
            print(
                json.dumps({"case": name, "phase": phase, "n_layers": model.n_layers, **found}),
                flush=True,
            )


Steered = Callable[[], AbstractContextManager[object]]


def _cases(model: LanguageModel, arguments: argparse.Namespace, ids: Tensor) -> dict[str, Steered]:
    """What is done to the model, by name."""
    threshold, topk = (_dictionaries(model, arguments.latents, k) for k in (0, 32))
    latents = {site: 7 + site.layer for site in topk}
    cases: dict[str, Steered] = {
        "add": _planned(model, threshold, Add(), latents),
        "floor, threshold": _planned(model, threshold, Floor(), latents),
        "floor, topk 32": _planned(model, topk, Floor(), latents),
        "product only": _at_all_sites(
            model, {site: sae.pre_activations for site, sae in topk.items()}
        ),
        "encode only": _at_all_sites(model, {site: sae.encode for site, sae in topk.items()}),
    }
    if arguments.trained.is_dir() and not arguments.tiny:
        trained = {site: load_sae(arguments.trained / site.short) for site in topk}
        cases["floor, trained topk 32"] = _planned(
            model, trained, Floor(), _firing(model, trained, ids)
        )
    return cases


def _planned(
    model: LanguageModel, saes: dict[Site, Sae], edit: Edit, latents: dict[Site, int]
) -> Steered:
    nodes = tuple(Node(at=f"{site.short}/{latents[site]}", scale=1.0) for site in saes)
    plan = Plan(nodes=nodes, edit=edit, strength=0.5)
    return lambda: applied(model, saes, plan)


def _at_all_sites(model: LanguageModel, reads: dict[Site, Callable[[Tensor], Tensor]]) -> Steered:
    def hook(read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            read(h.reshape(-1, h.shape[-1]).float())
            return h

        return edit

    return lambda: model.edited({site: hook(read) for site, read in reads.items()})


def _firing(model: LanguageModel, saes: dict[Site, Sae], ids: Tensor) -> dict[Site, int]:
    """A latent of each site, drawn among those that fire on at least one in two hundred tokens of
    the text."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for site, h in model.activations(ids, list(saes)).items():
        fires = (saes[site].encode(h.reshape(-1, h.shape[-1]).float()) > 0).float().mean(0)
        alive = (fires >= 0.005).nonzero().squeeze(1)
        found[site] = int(alive[torch.randint(len(alive), (1,), generator=generator)])
    return found


def _text(model: LanguageModel) -> Tensor:
    """8 × 128 tokens of the project's neutral texts."""
    tokens = [
        token
        for text in read_prompts().neutral_texts
        for token in model.tokenizer.encode(f" {text}")
    ]
    return torch.tensor((tokens * (1 + 1024 // len(tokens)))[:1024]).view(8, 128) % model.d_vocab


def _compare(run: Callable[[], float], steered_model: Steered, pairs: int) -> dict[str, float]:
    ratios, plain_seconds = [], []
    run()
    with steered_model():
        run()
    for _ in range(pairs):
        plain = run()
        with steered_model():
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


def _prefill(model: LanguageModel, ids: Tensor) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.hf(input_ids=ids, use_cache=False, logits_to_keep=1)
        return time.perf_counter() - started

    return run


def _decode(model: LanguageModel, text: Tensor, *, n_steps: int = 8) -> Callable[[], float]:
    """Steps after a short prompt; the prompt's pass is not timed."""
    ids = text.view(16, 64)

    def run() -> float:
        with torch.no_grad():
            cache = model.hf(input_ids=ids[:, :16], use_cache=True).past_key_values
            started = time.perf_counter()
            for step in range(16, 16 + n_steps):
                cache = model.hf(
                    input_ids=ids[:, step : step + 1], past_key_values=cache
                ).past_key_values
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
            W_enc=rows,
            b_enc=torch.zeros(n_latents),
            W_dec=rows,
            b_dec=zeros,
            b_in=zeros,
            activation=activation,
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--trained", type=Path, default=Path("artifacts/laptop/train/dictionaries"))
    parser.add_argument("--tiny", action="store_true", help="a small random model")
    return parser


if __name__ == "__main__":
    main()
