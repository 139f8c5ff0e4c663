"""Which features are mixtures of several features of the layer before: merges, splits,
recombinations?

At `n_pairs` neighbouring residual pairs, spread over the depth, every feature is built up from
features of the layer before, and every feature of the layer before from those after it; a part
joins only if chance gives no such cosine with what is left, and no such activity
(pipeline/flow/transformations.py). `control` is the share of decoys called mixtures by cosine:
each target with what it shares with its siblings, and the rest random. A link names one
predecessor; these are the targets that one does not explain. Cost: twice the steps of a mixture,
each as one linking of the pair.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Lt
from matplotlib.figure import Figure
from typing_extensions import Doc

from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.directions import Directions, directions_of
from pipeline.flow.functional import encode_tokens
from pipeline.flow.siblings import iter_decoys
from pipeline.flow.transformations import (
    MERGE,
    MOST,
    RECOMBINED,
    SPLIT,
    Mixtures,
    mixtures_of,
    transformations_of,
)
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import NPairs, NTokens, residual_pairs, spread
from pipeline.run import Run

TITLE = "features that are mixtures of several of the layer before: merges, splits, recombinations"
NEEDS = ("collect", "train", "link")
KINDS = (MERGE, SPLIT, RECOMBINED)
CLAIMS = ("control_share",)


class Config(Seeded):
    """How much is looked at."""

    n_pairs: NPairs = 8
    n_tokens: NTokens = 8192
    most: Annotated[int, Ge(2), Doc("parts of a mixture, at most")] = MOST
    fdr: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate of the parts")] = 0.05


def look(run: Run, config: Config) -> Finding:
    """Mixtures at each pair. Raises UserError without two neighbouring residual sites."""
    rows, members = [], []
    for source, target in spread(residual_pairs(run), config.n_pairs):
        row, found = _of_pair(run, source, target, config)
        rows.append(row)
        members.append(found)
    pairs, table = pd.DataFrame(rows), pd.concat(members, ignore_index=True)
    shares = {kind: float(pairs[kind].sum() / pairs["n_targets"].sum()) for kind in KINDS}
    headline = {
        **{f"{kind}_share": round(share, 4) for kind, share in shares.items()},
        "control_share": round(float(pairs["control"].mean()), 4),
    }
    return Finding(
        tables={"pairs": pairs, "members": table},
        text=_text(headline, pairs),
        headline=headline,
        figure=lambda: _draw(pairs),
        columns=_columns(table) if len(table) else None,
    )


def _of_pair(
    run: Run, source: Site, target: Site, config: Config
) -> tuple[dict[str, Any], pd.DataFrame]:
    held_out = run.held_out(config.n_tokens)
    codes = {site: encode_tokens(run.saes[site], held_out(site)) for site in (source, target)}
    living = {
        site: directions_of(run.saes[site].W_dec, name=site.short, device="cpu").restricted(
            torch.from_numpy(codes[site].n_fired > 0)
        )
        for site in (source, target)
    }

    def mixtures(of: Site, parts: Site) -> Mixtures:
        return mixtures_of(
            living[of],
            living[parts],
            codes=(codes[of], codes[parts]),
            fdr=config.fdr,
            most=config.most,
            seed=config.seed + target.layer,
        )

    backward = mixtures(target, source)
    found = transformations_of(backward, mixtures(source, target))
    decoys = mixtures_of(
        _decoys(living[target], config.seed), living[source], fdr=config.fdr, most=config.most
    )
    usable = living[target].usable.cpu().numpy()
    single = backward.n_parts == 1
    row = {
        "source_site": source.short,
        "target_site": target.short,
        "n_targets": int(usable.sum()),
        **{
            kind: int(found.loc[found["kind"] == kind, "target_latent"].nunique()) for kind in KINDS
        },
        "one_part": int(single.sum()),
        "explained_by_one": _median(backward.explained[single]),
        "explained_by_several": _median(backward.explained[backward.n_parts >= 2]),
        "control": float((decoys.n_parts >= 2).sum() / max(int(usable.sum()), 1)),
    }
    ends = {"target": target, "source": source}
    named = {
        f"{end}_feature": site.short + "/" + found[f"{end}_latent"].astype(str)
        for end, site in ends.items()
    }
    return row, found.assign(**named).drop(columns=["target_latent", "source_latent"])


def _decoys(target: Directions, seed: int) -> Directions:
    """Each living row with its own part replaced."""
    generator = torch.Generator().manual_seed(seed)
    unit = target.unit.clone()
    rows = unit[target.usable]
    unit[target.usable] = next(iter_decoys(rows, rows[:1], n=1, n_sources=0, generator=generator))
    return Directions(
        unit=unit, reads=unit, usable=target.usable, n_duplicates=0, mean_share=0.0, warnings=()
    )


def _columns(members: pd.DataFrame) -> pd.DataFrame:
    """What a feature's card says: the kind, its parts with weights, how much they explain."""
    told = members.assign(
        part=members["source_feature"] + " (" + members["weight"].map("{:.2f}".format) + ")"
    )
    return (
        told.groupby("target_feature", sort=False, as_index=False)
        .agg(
            transformation=("kind", "first"),
            made_of=("part", " + ".join),
            explained_share=("explained_share", "first"),
        )
        .rename(columns={"target_feature": "feature"})
    )


def _text(headline: dict[str, Any], pairs: pd.DataFrame) -> str:
    return (
        f"Of {int(pairs['n_targets'].sum())} features at {len(pairs)} pairs "
        f"{headline['merge_share']:.1%} are merges of several features of the layer before, "
        f"{headline['split_share']:.1%} parts of a split, {headline['recombined_share']:.1%} "
        f"recombinations. Of decoys {headline['control_share']:.1%} are called mixtures. One "
        f"feature explains {pairs['explained_by_one'].median():.2f} of the squared direction of "
        f"those with one part, several {pairs['explained_by_several'].median():.2f} of the others. "
        "Two SAEs of one layer are mixtures of each other too: a split may be the SAE's, not the "
        "model's."
    )


def _draw(pairs: pd.DataFrame) -> Figure:
    shares = pairs.assign(**{kind: pairs[kind] / pairs["n_targets"] for kind in KINDS})
    return bars(shares, by=["target_site"], columns={kind: f"{kind}, share" for kind in KINDS})


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")
