"""A run, a prompt and the words of a command into a trace, and a trace into lines.

    found = trace_prompt(Run.open("artifacts/laptop"), "The capital of France is")
    for line in lines_of(found, run): …

Answer and foil are tokens: the likeliest two, unless they are named. A text that is several tokens
is refused, with how it is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, parse_feature, parse_site
from pipeline.console import table
from pipeline.run import Run
from pipeline.trace.stream import Target, run_model
from pipeline.trace.supernodes import flows_of
from pipeline.trace.trace import DEFAULT, Trace, TraceOptions, every_third, trace_of

_LATE, _N_PROMOTED, _MOST_GB = 2 / 3, 4, 8.0


def trace_prompt(
    run: Run,
    prompt: str,
    *,
    answer: str | None = None,
    foil: str | None = None,
    feature: str | None = None,
    cuts: Sequence[str] = (),
    chat: bool = False,
    options: TraceOptions = DEFAULT,
) -> Trace:
    """Trace what the run's model says after a prompt, or why a feature (`L20/316@5`) is active
    there. Raises UserError."""
    model = run.exact_model
    ids = _ids(model, prompt, chat)
    sites = [parse_site(cut) for cut in cuts] or every_third(list(run.saes))
    if unknown := [site.short for site in sites if site not in run.saes]:
        known = ", ".join(site.short for site in run.saes)
        raise UserError("no SAE at these cuts", found=", ".join(unknown), expected=known)
    if feature is None:
        target = _target(model, ids, answer, foil)
    else:
        target = _feature_target(run, ids, feature)
        assert target.feature is not None
        sites = [site for site in sites if site < target.feature.site]
        if not sites:
            raise UserError("no cut lies before this feature", where=feature)
    _refuse_too_large(model, ids, options)
    flows = flows_of(run.graph) if run.has("link") else {}
    return trace_of(
        model, run.saes, ids, target=target, cuts=sorted(sites), flows=flows, options=options
    )


def _ids(model: Any, prompt: str, chat: bool) -> list[int]:
    if not prompt.strip():
        raise UserError("the prompt is empty", expected="a text that the model goes on with")
    tokenizer = model.tokenizer
    if chat:
        ids = tokenizer.chat([{"role": "user", "content": prompt}], name=model.name)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) > model.n_context:
        raise UserError(
            "the prompt does not fit the model's context",
            found=f"{len(ids)} tokens",
            expected=f"at most {model.n_context}",
        )
    return ids


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
        )
    return int(ids[0])


def _feature_target(run: Run, ids: Sequence[int], text: str) -> Target:
    name, at, place = text.partition("@")
    feature = parse_feature(name)
    if not at or not place.isdecimal() or not 0 < int(place) < len(ids):
        raise UserError(
            "no token of the prompt",
            where=text,
            expected=f"{name}@<token>, 1 … {len(ids) - 1} (0 is the start token)",
        )
    if feature.site not in run.saes or feature.latent >= run.saes[feature.site].n_latents:
        raise UserError(f"the run has no feature {name}")
    return Target(feature=feature, token=int(place))


def _refuse_too_large(model: Any, ids: Sequence[int], options: TraceOptions) -> None:
    """The attention and the MLP of one layer for all rows, the largest that is held at once."""
    rows = 1 + 2 * options.n_removed
    wide = getattr(model.hf.config, "intermediate_size", None) or 4 * model.d_model
    heads = getattr(model.hf.config, "num_attention_heads", 1)
    gigabytes = 4 * rows * len(ids) * (3 * wide + 2 * heads * len(ids) + model.d_vocab / len(ids))
    gigabytes /= 1e9
    if gigabytes > _MOST_GB:
        raise UserError(
            "this trace needs too much memory",
            found=f"about {gigabytes:.0f} GB for {len(ids)} tokens × {rows} rows",
            expected=f"at most {_MOST_GB:g} GB",
            fix="shorten the prompt or remove fewer supernodes (--removed)",
        )


def lines_of(found: Trace, run: Run) -> Iterator[str]:
    """The trace as a person reads it in the terminal."""
    tokenizer, target = run.exact_model.tokenizer, found.traced.target
    pieces = [tokenizer.token_text(i) for i in found.traced.ids]
    yield " | ".join(f"{number} {piece!r}" for number, piece in enumerate(pieces))
    yield headline_of(found, tokenizer)
    n, shown = found.n_groups, min(found.options.n_shown, len(found.supernodes))
    yield (
        f"{shown} of {n} supernodes shown; the {len(found.supernodes)} removed hold "
        f"{found.share_removed:.0%} of the weight. y is the change of y when it is removed; "
        "predicted, by the gradient."
    )
    header = ("", "token", "layers", "y", "predicted", "KL", "says then", "name")
    rows = []
    for row in found.supernodes.head(shown).to_dict(orient="records"):
        flag = "breaks the text" if row["breaks"] else "≠" if row["differs"] else ""
        top = zip(row["top_tokens"], row["top_probabilities"], strict=True)
        says = ", ".join(f"{tokenizer.token_text(t)!r} {p:.2f}" for t, p in list(top)[:2])
        rows.append(
            (
                f"S{row['supernode']}",
                f"{row['token']} {pieces[row['token']]!r}",
                f"L{row['first_layer']}–L{row['last_layer']}",
                f"{row['removed']:+.2f}",
                f"{row['predicted']:+.2f} {flag}".rstrip(),
                f"{row['kl']:.2f}",
                says if target.feature is None else "",
                name_of(row, run),
            )
        )
    yield from table(rows, header=header)
    drawn = found.edges[found.edges["drawn"]]
    for edge in drawn.head(found.options.n_shown).to_dict(orient="records"):
        predicted = edge["predicted"]
        guess = f", by gradient {predicted:+.2f}" if predicted == predicted else ""
        yield f"S{edge['source']} → S{edge['target']}: {edge['removed']:+.2f}{guess}"
    yield from table(
        [(row.check, f"{row.value:.2g}", row.note) for row in found.checks.itertuples()]
    )


def headline_of(found: Trace, tokenizer: Any) -> str:
    """What is explained, in one line."""
    target, y = found.traced.target, found.traced.y
    if target.feature is not None:
        return f"{target.feature} on token {target.token}: pre-activation {y:.2f}"
    probability = found.traced.logits.softmax(-1)
    answer, foil = (
        f"{tokenizer.token_text(i)!r} ({float(probability[i]):.4f})"
        for i in (target.answer, target.foil)
    )
    return f"{answer} against {foil}: y = {y:.2f}"


def name_of(row: Mapping[str, Any], run: Run) -> str:
    """The label of the first member that has an accepted one; what the last promotes for a
    supernode that is late, or that has none."""
    features = str(row["features"]).split(" ")
    n_layers = max(site.layer for site in run.saes) + 1
    is_late = row["first_layer"] >= _LATE * n_layers
    labels = _accepted(run) if run.has("describe") and not is_late else {}
    label = next((labels[f] for f in features if f in labels), None)
    return label or f"promotes {', '.join(_promoted(run, parse_feature(features[-1])))}"


@cache
def _accepted(run: Run) -> Mapping[str, str]:
    frame = run.features.table
    frame = frame[frame["label_accepted"].astype(bool)]
    return dict(zip(frame["feature"], frame["label"], strict=True))


def _promoted(run: Run, feature: FeatureId) -> list[str]:
    model = run.exact_model
    weight, gain = model.unembedding()
    direction = run.saes[feature.site].W_dec[feature.latent].float()
    best = (weight @ (gain * direction)).topk(_N_PROMOTED).indices.tolist()
    return [model.tokenizer.token_text(i).strip() for i in best]
