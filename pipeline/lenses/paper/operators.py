"""Carrying latents from layer to layer rerun: transition operators, SAE Match's curves, and the
matchers side by side.

`transitions`: explained variance and matching score of every operator between neighbouring residual
sites. `sae_match`: permutations by each objective: what the model loses when it goes on with
carried latents, how far apart matched and unmatched parameters are, and how composing permutations
over several layers compares with matching at once. `matchers`: pipeline/flow/matchers.py on
held-out firing and, in the model, by removal.

Sources: Feature Flow App. F, Fig. 23 and 24; SAE Match Fig. 3, 7, 8, 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.flow.assignment import OBJECTIVES, Assignment, Objective, assign, latent_rows
from pipeline.flow.causal import DeactivationOptions, measure_deactivation, summarise_deactivation
from pipeline.flow.matchers import PairData, compare_matchers
from pipeline.flow.transitions import (
    WEIGHTS,
    Choice,
    Permutation,
    TopK,
    explained_variance,
    matching_score,
    measure_skipping,
    operator,
    rescaled,
    scale_of,
    skipping,
)
from pipeline.lenses.paper.figures import draw_bars, draw_lines
from pipeline.lenses.paper.published import EV_PERMUTATION, EV_PERMUTATION_FOLDED, EV_TOP_1
from pipeline.lenses.paper.subject import Effort, Finding, Layer, Subject, layers_of, spread
from sae import Sae, SparseCodes
from sae.activations import Threshold

_PARTS: tuple[Objective, ...] = ("decoder", "encoder")
MOST_STEPS = 6
"""Distance, in sites, up to which compositions are followed."""


def transitions(subject: Subject, effort: Effort) -> Finding:
    """Explained variance and matching score of every operator, between neighbouring residual
    sites."""
    pairs = spread(_residual_pairs(subject), effort.n_pairs)
    rows = []
    for done, (source, target) in enumerate(pairs):
        subject.progress("carry latents", done, len(pairs))
        rows += _operators_of(subject.pair(source, target), source, target)
    subject.progress("carry latents", len(pairs), len(pairs))
    table = pd.DataFrame(rows)
    summary = table.groupby(["operator", "inference"], as_index=False, sort=False).agg(
        ev=("ev", "mean"),
        ev_low=("ev", "min"),
        ev_high=("ev", "max"),
        score=("score", "mean"),
        n_pairs=("ev", "size"),
    )
    order = summary.sort_values("ev", ascending=False)
    lines = [
        f"  {row.operator}, {row.inference}: {row.ev:.3f}" for row in order.head(6).itertuples()
    ]
    low, high = EV_PERMUTATION_FOLDED
    text = (
        f"What the paper saw (Fig. 23, layers 14 → 15): top-1 decoder cosine {EV_TOP_1}, "
        "permutations with folded\n"
        f"inference {low} to {high}, without {EV_PERMUTATION[0]} to {EV_PERMUTATION[1]}.\n\n"
        f"What this model shows, mean over {len(pairs)} pairs, the best six (bars show the range "
        "over pairs):\n" + "\n".join(lines)
    )
    return Finding(
        tables={"operators": table, "summary": summary},
        draw=lambda path: draw_bars(
            order.head(24),
            path,
            by=("operator", "inference"),
            columns={"ev": "explained variance", "score": "matching score"},
        ),
        text=text,
        summary={
            f"ev {row.operator}, {row.inference}": round(row.ev, 4)
            for row in order.head(3).itertuples()
        },
    )


def sae_match(subject: Subject, effort: Effort) -> Finding:
    """Permutations: parameters apart, loss when a layer is skipped, and compositions over several
    layers."""
    model = subject.open_model()
    contexts = subject.contexts(model, effort.n_contexts)
    pairs = spread(_residual_pairs(subject), effort.n_pairs)
    parameters, losses = [], []
    for source, target in pairs:
        a, b = subject.dictionaries[source], subject.dictionaries[target]
        pair = subject.pair(source, target)
        found = {
            objective: assign(a, b, objective=objective, n_candidates=pair.n_candidates)
            for objective in OBJECTIVES
        }
        parameters += _distances(a, b, found, source, target, effort.seed)
        predictors = _predictors(pair, found)
        table = measure_skipping(
            model,
            contexts,
            source=source,
            target=target,
            predictors=predictors,
            progress=subject.progress,
        )
        losses.append(table.assign(source=source.short, target=target.short, layer=target.layer))
    loss = pd.concat(losses, ignore_index=True)
    by_layer = loss.groupby(["layer", "target", "predictor"], as_index=False)["delta_ce"].mean()
    paths = _compositions(subject, effort)
    return Finding(
        tables={
            "parameters": pd.DataFrame(parameters),
            "skipping": loss,
            "by_layer": by_layer,
            "composition": paths,
        },
        draw=lambda path: draw_lines(
            by_layer,
            path,
            x="layer",
            line="predictor",
            columns={"delta_ce": "ΔCE when the layer is skipped, nats"},
        ),
        text=_sae_match_text(by_layer, paths),
        summary={
            f"delta_ce {name}": round(float(value), 4)
            for name, value in by_layer.groupby("predictor")["delta_ce"].mean().items()
        },
    )


def matchers(subject: Subject, effort: Effort) -> Finding:
    """Every matcher on the same targets: firing on tokens it did not see, and removal in the
    model."""
    model = subject.open_model()
    contexts = subject.contexts(model, effort.n_contexts)
    pairs = spread(_residual_pairs(subject), effort.n_pairs)
    tables, trials = [], []
    for source, target in pairs:
        fitted, judge = subject.pair(source, target, half=0), subject.pair(source, target, half=1)
        table, best = compare_matchers(fitted, (judge.source_codes, judge.target_codes))
        tables.append(table.assign(source=source.short, target=target.short))
        trials.append(
            measure_deactivation(
                model,
                {source: fitted.source, target: fitted.target},
                source=source,
                target=target,
                predecessors={name: index[:, None] for name, index in best.items()},
                contexts=contexts,
                options=DeactivationOptions(
                    n_targets=effort.n_targets,
                    n_targets_per_context=max(1, -(-effort.n_targets // len(contexts.ids))),
                    seed=effort.seed + target.layer,
                ),
                progress=subject.progress,
            )
        )
    removed = summarise_deactivation(pd.concat(trials, ignore_index=True), seed=effort.seed)
    by_pair = pd.concat(tables, ignore_index=True)
    mean = by_pair.groupby("matcher", as_index=False, sort=False).mean(numeric_only=True)
    summary = mean.merge(removed, left_on="matcher", right_on="strategy", how="outer").sort_values(
        "success"
    )
    summary["matcher"] = summary["matcher"].fillna(summary["strategy"])
    lines = [
        f"  {row.matcher}: Pearson {row.pearson_median:.2f}, success {row.success:.2f}, change "
        f"{row.change:.2f}"
        for row in summary.itertuples()
    ]
    return Finding(
        tables={
            "by_pair": by_pair,
            "trials": pd.concat(trials, ignore_index=True),
            "summary": summary,
        },
        draw=lambda path: draw_bars(
            summary,
            path,
            by=("matcher",),
            columns={"success": "success", "pearson_median": "Pearson, other tokens"},
        ),
        text="What the paper saw: top-1 cosine and Pearson succeed equally often (0.65, Table "
        "1).\n\n"
        f"What this model shows, over {len(pairs)} pairs:\n" + "\n".join(lines),
        summary={
            f"success {row.matcher}": round(float(row.success), 4) for row in summary.itertuples()
        },
    )


def _residual_pairs(subject: Subject) -> list[tuple[Site, Site]]:
    def pair_of(layer: Layer) -> tuple[Site, Site]:
        return layer.links["residual"].source, layer.target

    pairs = [pair_of(layer) for layer in layers_of(subject) if "residual" in layer.links]
    if not pairs:
        raise UserError(
            "there are no neighbouring residual dictionaries", fix="set collect.sites to resid_post"
        )
    return pairs


def _choices(pair: PairData) -> dict[str, Choice]:
    """Every operator: permutations by objective, top-k by weights; folded before comparing where
    there is a θ."""
    folds = (False, True) if isinstance(pair.source.activation, Threshold) else (False,)
    found: dict[str, Choice] = {}
    for fold in folds:
        suffix = ", folded" if fold else ""
        for objective in OBJECTIVES:
            found[f"permutation {objective}{suffix}"] = Permutation(
                objective=objective, fold=fold, n_candidates=pair.n_candidates
            )
        for weights in WEIGHTS:
            for k in (1, 2, 3, 4, 5):
                found[f"top-{k} {weights}{suffix}"] = TopK(k=k, weights=weights, fold=fold)
    return found | {"top-1 dec-dec of each target": TopK(of="target")}


def _operators_of(pair: PairData, source: Site, target: Site) -> list[dict[str, object]]:
    """One row per operator and way of inference; the source is encoded once."""
    batches = [(pair.source.encode_sparse(left), right) for left, right in pair.rows()]
    scales = (scale_of(pair.source, pair.source_codes), scale_of(pair.target, pair.target_codes))
    where = {"source": source.short, "target": target.short}
    rows: list[dict[str, object]] = []
    for name, choice in _choices(pair).items():
        plain = operator(pair.source, pair.target, choice)
        score = matching_score(plain, pair.source_codes, pair.target_codes)
        for inference, matrix in (("unscaled", plain), ("folded", rescaled(plain, *scales))):
            ev = explained_variance(_decoding(skipping(pair.source, pair.target, matrix)), batches)
            rows.append(
                where
                | {"operator": name, "inference": inference, "ev": ev, "score": score.of_firings}
            )
    own = ((right, right) for _, right in pair.rows())
    references = {
        "source's own decoder": explained_variance(_decoding(pair.source), batches),
        "target's own reconstruction": explained_variance(pair.target, own),
    }
    rows += [
        where | {"operator": n, "inference": "none", "ev": ev, "score": np.nan}
        for n, ev in references.items()
    ]
    return rows


def _decoding(sae: Sae) -> Callable[[SparseCodes], Tensor]:
    return lambda codes: sae.decode(codes)


def _predictors(
    pair: PairData, found: Mapping[Objective, Assignment]
) -> dict[str, Sae | Callable[[Tensor], Tensor]]:
    """What the model goes on with: permuted latents (folded), top-1 cosine, the unchanged
    stream."""
    scales = (scale_of(pair.source, pair.source_codes), scale_of(pair.target, pair.target_codes))
    made: dict[str, Sae | Callable[[Tensor], Tensor]] = {
        f"permutation {name}": skipping(
            pair.source, pair.target, rescaled(_matrix(assignment), *scales)
        )
        for name, assignment in found.items()
    }
    made["permutation decoder, not folded"] = skipping(
        pair.source, pair.target, _matrix(found["decoder"])
    )
    top_1 = operator(pair.source, pair.target, TopK())
    made["top-1 cosine"] = skipping(pair.source, pair.target, rescaled(top_1, *scales))
    made["the layer left out"] = lambda x: x
    return made


def _matrix(found: Assignment) -> sparse.csr_matrix:
    matched = np.flatnonzero(found.target_of >= 0)
    shape = (len(found.target_of), found.n_targets)
    ones = np.ones(len(matched), dtype=np.float32)
    return sparse.csr_matrix((ones, (matched, found.target_of[matched])), shape=shape)


def _distances(
    a: Sae, b: Sae, found: Mapping[Objective, Assignment], source: Site, target: Site, seed: int
) -> list[dict[str, object]]:
    """Mean squared distance of decoder and encoder rows: matched, and with partners shuffled."""
    rows: list[dict[str, object]] = []
    for objective, assignment in found.items():
        matched = np.flatnonzero(assignment.target_of >= 0)
        partner = assignment.target_of[matched]
        shuffled = np.random.default_rng(seed).permutation(partner)
        for part in _PARTS:
            left, right = (latent_rows(sae, part).numpy() for sae in (a, b))
            rows.append(
                {
                    "source": source.short,
                    "target": target.short,
                    "objective": objective,
                    "part": part,
                    "matched": float(np.square(left[matched] - right[partner]).mean()),
                    "shuffled": float(np.square(left[matched] - right[shuffled]).mean()),
                }
            )
    return rows


def _compositions(subject: Subject, effort: Effort) -> pd.DataFrame:
    """From a third of the depth on: assignments composed step by step, and found at once; how often
    partners fire."""
    pairs = _residual_pairs(subject)
    first = len(pairs) // 3
    start = pairs[first][0]
    a, rows = subject.dictionaries[start], []
    composed: Assignment | None = None
    for steps, (before, target) in enumerate(pairs[first : first + MOST_STEPS], start=1):
        pair = subject.pair(start, target)
        step = assign(subject.dictionaries[before], pair.target, n_candidates=pair.n_candidates)
        composed = step if composed is None else composed.then(step)
        at_once = assign(a, pair.target, n_candidates=pair.n_candidates)
        for way, found in (("composed", composed), ("at once", at_once)):
            score = matching_score(_matrix(found), pair.source_codes, pair.target_codes)
            matched = np.flatnonzero(found.target_of >= 0)
            left = pair.source_directions.unit.numpy()[matched]
            right = pair.target_directions.unit.numpy()[found.target_of[matched]]
            rows.append(
                {
                    "source": start.short,
                    "target": target.short,
                    "steps": steps,
                    "way": way,
                    "score": score.of_firings,
                    "cosine": float((left * right).sum(1).mean()),
                    "same": float(np.mean(composed.target_of == at_once.target_of)),
                }
            )
    return pd.DataFrame(rows)


def _sae_match_text(by_layer: pd.DataFrame, paths: pd.DataFrame) -> str:
    mean = by_layer.groupby("predictor", sort=False)["delta_ce"].mean()
    lines = [f"  {name}: {value:.2f} nats" for name, value in mean.items()]
    scores = paths.pivot(index="steps", columns="way", values="score")
    lines += [
        f"  {steps} step(s) apart, matching score: at once {row['at once']:.2f}, composed "
        f"{row['composed']:.2f}"
        for steps, row in scores.iterrows()
    ]
    return (
        "What the paper saw (SAE Match, axis level only): ΔCE of 0.5 to 3 nats in early layers, "
        "small from about\n"
        "layer 10 on (Fig. 10); matching score about 0.2 to 0.6 (Fig. 7); matching at once is at "
        "least as good as\n"
        "composing, and both fade over about five layers (Fig. 8).\n\n"
        f"What this model shows, over {by_layer['target'].nunique()} layers:\n" + "\n".join(lines)
    )
