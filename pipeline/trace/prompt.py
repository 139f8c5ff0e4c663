"""A run, a prompt and the words of a command into a trace.

    found = Run.open("artifacts/laptop").trace("The capital of France is")

Answer and foil are tokens: the likeliest two, unless they are named. A text that is several tokens
is refused, with how it is split. Nothing is run before all of it is known to be possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch

from featureflow.errors import UserError
from featureflow.progress import Progress
from featureflow.sites import Site, parse_feature, parse_site
from pipeline.trace.stream import BLOCK_TOKENS, Target, run_model
from pipeline.trace.supernodes import flows_of
from pipeline.trace.trace import DEFAULT, Trace, TraceOptions, every_third, iter_trace
from sae import Sae

if TYPE_CHECKING:
    from pipeline.run import Run

_SHARE_OF_FREE = 0.9


def trace_prompt(run: Run, prompt: str, **options: Any) -> Trace:
    """Trace what the run's model says after a prompt, or why a feature is active there: see
    `iter_prompt`. Raises UserError."""
    *_, last = iter_prompt(run, prompt, **options)
    return last


def iter_prompt(
    run: Run,
    prompt: str,
    *,
    answer: str | None = None,
    foil: str | None = None,
    feature: str | None = None,
    cuts: Sequence[str] = (),
    chat: bool = False,
    memory_gb: float | None = None,
    options: TraceOptions = DEFAULT,
    progress: Progress | None = None,
) -> Iterator[Trace]:
    """The trace as it grows. `feature` (`L20/316@5`) explains a feature on a token in place of the
    answer against the foil; `chat` puts the prompt into the model's template; `memory_gb` is what
    may be used, by default what is free. Raises UserError."""
    model, direct = run.exact_model, options.through == "transcoders"
    saes = _transcoders(run) if direct else run.saes
    ids = ids_of(model, prompt, chat)
    _refuse_too_large(model, len(ids), memory_gb)
    if direct and cuts:
        raise UserError("transcoders cut at every layer", fix="leave out the cuts")
    sites = [parse_site(cut) for cut in cuts] or (list(saes) if direct else every_third(list(saes)))
    if unknown := [site.short for site in sites if site not in saes]:
        known = ", ".join(site.short for site in saes)
        raise UserError("no SAE at these cuts", found=", ".join(unknown), expected=known)
    if feature is None:
        target = _target(model, ids, answer, foil)
    else:
        target = _feature_target(saes, ids, feature)
        assert target.feature is not None
        sites = [site for site in sites if site < target.feature.site]
        if not sites:
            raise UserError("no cut lies before this feature", where=feature)
    yield from iter_trace(
        model,
        saes,
        ids,
        target=target,
        cuts=sorted(sites),
        flows=flows_of(run.graph, tuple(sorted(sites))) if run.has("link") and not direct else {},
        options=options,
        progress=progress or run.context.progress,
    )


def ids_of(model: Any, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens, the start token first. Raises UserError for one that is empty or longer
    than the context."""
    if not prompt.strip():
        raise UserError("the prompt is empty", expected="a text that the model goes on with")
    tokenizer = model.tokenizer
    if chat:
        ids = tokenizer.chat([{"role": "user", "content": prompt}], name=model.name)
    else:
        ids = [*_start(tokenizer), *tokenizer.encode(prompt)]
    if len(ids) > model.n_context:
        raise UserError(
            "the prompt does not fit the model's context",
            found=f"{len(ids)} tokens",
            expected=f"at most {model.n_context}",
        )
    return ids


def _start(tokenizer: Any) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _target(model: Any, ids: Sequence[int], answer: str | None, foil: str | None) -> Target:
    with torch.no_grad():
        best = run_model(model, [ids], {})[0].topk(3).indices.tolist()
    chosen = best[0] if answer is None else _token(model, answer, "answer")
    runner_up = next(token for token in best if token != chosen)
    against = runner_up if foil is None else _token(model, foil, "foil")
    if against == chosen:
        text = model.tokenizer.token_text(chosen)
        raise UserError("answer and foil are the same token", found=repr(text))
    return Target(answer=chosen, foil=against)


def _token(model: Any, text: str, name: str) -> int:
    ids = model.tokenizer.encode(text)
    if len(ids) != 1:
        split = " + ".join(repr(model.tokenizer.token_text(i)) for i in ids) or "nothing"
        raise UserError(
            f"the {name} is not one token",
            found=f"{text!r} is {split}",
            expected="one token, mostly with the space before it: ' Paris'",
            fix="name its first token",
        )
    return int(ids[0])


def _transcoders(run: Run) -> Mapping[Site, Sae]:
    """Those of every layer. Raises UserError when one is missing."""
    n_layers, saes = run.exact_model.n_layers, run.transcoders
    missing = [f"L{i}.mlp" for i in range(n_layers) if Site(i, "mlp_out") not in saes]
    if missing:
        raise UserError("a layer has no transcoder", where=str(run.root), found=", ".join(missing))
    return saes


def _feature_target(saes: Mapping[Site, Sae], ids: Sequence[int], text: str) -> Target:
    name, at, place = text.partition("@")
    feature = parse_feature(name)
    if not at or not place.isdecimal() or not 0 < int(place) < len(ids):
        raise UserError(
            "no token of the prompt",
            where=text,
            expected=f"{name}@<token>, 1 … {len(ids) - 1} (0 is the start token)",
        )
    if feature.site not in saes or feature.latent >= saes[feature.site].n_latents:
        raise UserError(f"the run has no feature {name}")
    return Target(feature=feature, token=int(place))


def _refuse_too_large(model: Any, n_tokens: int, memory_gb: float | None) -> None:
    """What the backward pass keeps of every layer (activations and attention patterns), or one
    block of edits in one layer with its logits, whichever is more."""
    config = model.hf.config
    wide = getattr(config, "intermediate_size", None) or 4 * model.d_model
    n_heads = getattr(config, "num_attention_heads", 1)
    rows = max(1, BLOCK_TOKENS // n_tokens)
    of_layer = n_tokens * (12 * model.d_model + 4 * wide) + 2 * n_heads * n_tokens**2
    needed = 4e-9 * max(model.n_layers * of_layer, rows * (of_layer + model.d_vocab))
    free = psutil.virtual_memory().available / 1e9 * _SHARE_OF_FREE
    most = free if memory_gb is None else memory_gb
    if needed > most:
        raise UserError(
            "this trace needs too much memory",
            found=f"about {needed:.2g} GB for {n_tokens} tokens",
            expected=f"at most {most:.2g} GB",
            fix="shorten the prompt",
        )
