"""What did fine-tuning change: which of the model's features moved, and where to?

Two models read the same held-out tokens; the first one's SAEs read both.

1. *Concept shift* of a feature: Δ = mean of h_after − h_before over the tokens it is active on. It
   counts as *moved* when Δ is longer than for the same pattern of activity laid over other
   documents (each document gets the differences of another, which keeps how both cluster), at the
   rate `fdr`.
2. *Lost*: active on less than a tenth of what it was; *new*: the other way round; by a sign test
   over documents at the same rate. *Kept*: the rest.
3. *Recovered share*: with Δ from half of the documents, how much nearer the feature's mean vector
   before comes to that after in the other half, when αΔ is added; beside another feature's Δ.
4. What the SAE leaves unexplained (FVU) before and after says whether something came that it has
   no latent for.

Without `other` the model is compared with itself: nothing may be found. Cost: two forward passes of
`n_tokens`, `n_placements` products of codes and differences a site. Source: the shift of means is
that of the seed's paper on fine-tuning and representation shift; the null is this project's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Float, Int
from scipy.stats import binom
from torch import Tensor
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from data.model.spec import Folder
from data.store.provenance import model_digest
from featureflow.errors import Command, UserError
from featureflow.sites import Site, parse_site
from featureflow.statistics import p_values, q_values
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.held_out import choose_contexts
from pipeline.lenses.parts.layers import spread
from pipeline.run import Run
from sae import Sae

TITLE = "what fine-tuning changed: features moved, kept, new and lost, between two models"
NEEDS = ("collect", "train")
CLAIMS = ("n_moved", "n_new", "n_lost")
STATES = ("kept", "moved", "new", "lost")
ALPHAS = (0.5, 1.0, 2.0)
_LEAST_ACTIVE, _FOLD, _BATCH = 10, 10, 8


class Config(Sampled):
    """With which model, and on how much text."""

    other: Annotated[
        str, Doc("folder of the other model (featureflow finetune); empty: the model itself")
    ] = ""
    n_tokens: Annotated[int, Ge(64), Doc("held-out tokens")] = 4096
    sites: Annotated[
        tuple[str, ...], Doc("sites such as L26; empty: some residual ones, spread over the depth")
    ] = ()
    n_sites: Annotated[int, Ge(1), Doc("residual sites, where none are named")] = 4
    n_placements: Annotated[
        int, Ge(3), Doc("times that each document gets the differences of another")
    ] = 20
    fdr: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate")] = 0.05


def outside_digests(config: Config) -> dict[str, str]:
    """The other model's files."""
    there = config.other and Path(config.other).is_dir()
    return {"other": model_digest(Folder(path=Path(config.other)))} if there else {}


def look(run: Run, config: Config) -> Finding:
    """One row a site, one a feature. Raises UserError for a model of another shape or tokenizer."""
    sites = [parse_site(name) for name in config.sites] or spread(
        [site for site in run.saes if site.kind == "resid_post"], config.n_sites
    )
    if missing := [site.short for site in sites if site not in run.saes]:
        known = ", ".join(site.short for site in run.saes)
        raise UserError("there are no SAEs here", found=", ".join(missing), expected=known)
    before, after, documents = _read(run, sites, config)
    rows: list[dict[str, Any]] = []
    features: list[pd.DataFrame] = []
    for site in sites:
        run.context.progress(f"compare at {site.short}", len(rows), len(sites))
        row, table = shifts(run.saes[site], before[site], after[site], documents, config)
        rows.append({"site": site.short, "layer": site.layer} | row)
        names = [f"{site.short}/{latent}" for latent in table["latent"]]
        features.append(table.assign(feature=names, site=site.short))
    by_site, table = pd.DataFrame(rows), pd.concat(features, ignore_index=True)
    return Finding(
        tables={"sites": by_site, "features": table},
        figure=lambda: bars(by_site, by=["site"], columns={name: name for name in STATES}),
        text=_text(by_site),
        headline={
            "n_features": int(by_site["n_features"].sum()),
            **{f"n_{state}": int(by_site[state].sum()) for state in STATES},
            "recovered_share": float(by_site["recovered_1"].median()),
        },
        columns=table[["feature", "change", "shift"]],
    )


def _read(
    run: Run, sites: list[Site], config: Config
) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Int[np.ndarray, "token"]]:
    """Activations of both models at the same held-out tokens, and the tokens' documents."""
    contexts = choose_contexts(run, config, config.n_tokens)
    kept = contexts.spliced
    found = []
    for model in (run.model, _other(run, config)):
        parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for at in torch.arange(len(contexts.ids)).split(_BATCH):
            given = model.activations(contexts.ids[at].to(model.device), sites)
            for site in sites:
                parts[site].append(given[site][kept[at].to(model.device)].float().cpu())
        found.append({site: torch.cat(each) for site, each in parts.items()})
    return found[0], found[1], contexts.documents[kept].numpy()


def _other(run: Run, config: Config) -> LanguageModel:
    if not config.other:
        return run.model
    model = run.model
    dtype = str(model.dtype).removeprefix("torch.")
    other = LanguageModel.open(
        Folder(path=Path(config.other)), dtype=dtype, device=str(model.device)
    )
    ours, theirs = (
        f"width {m.d_model}, {m.n_layers} layers, tokenizer {m.tokenizer.fingerprint[:12]}"
        for m in (model, other)
    )
    if ours != theirs:
        raise UserError(
            "the other model cannot be laid beside this one",
            where=config.other,
            expected=ours,
            found=theirs,
            fix=Command("finetune", "OUT"),
        )
    return other


@torch.no_grad()
def shifts(
    sae: Sae,
    before: Float[Tensor, "token d"],
    after: Float[Tensor, "token d"],
    documents: Int[np.ndarray, "token"],
    config: Config,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """What happened at one site: its numbers, and a row for each feature that is active enough in
    one of the models. Rows of a document lie together."""
    z, z_after = sae.encode(before), sae.encode(after)
    active, active_after = z > 0, z_after > 0
    n, n_after = active.sum(0).numpy(), active_after.sum(0).numpy()
    p = _chance(active, after - before, documents, config)
    shown = np.flatnonzero(np.maximum(n, n_after) >= _LEAST_ACTIVE)
    p_count = _sign_test(active, active_after, documents)
    q, q_count = (np.ones(len(n)) for _ in range(2))
    tested = shown[n[shown] >= _LEAST_ACTIVE]
    q[tested], q_count[shown] = q_values(p[tested]), q_values(p_count[shown])
    state = np.full(len(n), STATES[0], dtype=object)
    state[q <= config.fdr] = "moved"
    state[(q_count <= config.fdr) & (n_after * _FOLD <= n)] = "lost"
    state[(q_count <= config.fdr) & (n * _FOLD <= n_after)] = "new"
    size = _means(active, after - before, n).norm(dim=1) / before.norm(dim=1).median()
    strength = (z_after * active).sum(0) / z.sum(0).clamp_min(1e-12)
    table = pd.DataFrame(
        {
            "latent": shown,
            "change": state[shown],
            "shift": size.numpy()[shown],
            "q_value": q[shown],
            "n_before": n[shown],
            "n_after": n_after[shown],
            "strength": strength.numpy()[shown],
        }
    )
    moved = np.flatnonzero(state == "moved")
    return {
        "n_features": len(shown),
        **{name: int((state[shown] == name).sum()) for name in STATES},
        "shift": float((after - before).norm() / before.norm()),
        "fvu_before": _fvu(sae, before, z),
        "fvu_after": _fvu(sae, after, z_after),
        **_recovered(active, active_after, before, after, documents, moved),
    }, table


def _means(
    active: Bool[Tensor, "token latent"], values: Float[Tensor, "token d"], n: np.ndarray
) -> Float[Tensor, "latent d"]:
    """The mean of `values` over the tokens that each latent is active on."""
    return active.float().T @ values / torch.from_numpy(n).clamp_min(1)[:, None]


def _chance(
    active: Bool[Tensor, "token latent"],
    difference: Float[Tensor, "token d"],
    documents: Int[np.ndarray, "token"],
    config: Config,
) -> Float[np.ndarray, "latent"]:
    """How often a shift so long, in units of the feature's own null, comes of the differences of
    other documents; null values in units of the other placements."""
    n = active.sum(0).numpy()
    rng = np.random.default_rng(config.seed)
    placed = (_of_others(documents, rng) for _ in range(config.n_placements))
    null = np.stack([_means(active, difference[rows], n).norm(dim=1).numpy() for rows in placed])
    observed = _means(active, difference, n).norm(dim=1).numpy()
    others = [np.delete(null, i, axis=0) for i in range(len(null))]
    tested = n >= _LEAST_ACTIVE
    in_units = np.stack([_units(row, rest) for row, rest in zip(null, others, strict=True)])
    return p_values(_units(observed, null), in_units[:, tested].ravel())


def _of_others(
    documents: Int[np.ndarray, "token"], rng: np.random.Generator
) -> Int[Tensor, "token"]:
    """For every row one of another document at the same place; shorter documents are repeated."""
    order = np.argsort(documents, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(documents[order])) + 1)
    mixed = rng.permutation(len(rows))
    out = np.empty(len(documents), dtype=np.int64)
    for mine, theirs in zip(mixed, np.roll(mixed, 1), strict=True):
        out[rows[mine]] = np.resize(rows[theirs], len(rows[mine]))
    return torch.from_numpy(out)


def _units(
    value: Float[np.ndarray, "latent"], null: Float[np.ndarray, "placement latent"]
) -> np.ndarray:
    spread_of = null.std(0, ddof=1)
    known = spread_of > 1e-9 * (1e-30 + null.mean(0))
    return np.where(known, (value - null.mean(0)) / np.where(known, spread_of, 1), 0.0)


def _sign_test(
    before: Bool[Tensor, "token latent"],
    after: Bool[Tensor, "token latent"],
    documents: Int[np.ndarray, "token"],
) -> Float[np.ndarray, "latent"]:
    """Two-sided, over the documents in which a latent is active more often in one model."""
    which, inverse = np.unique(documents, return_inverse=True)
    counts = torch.zeros(len(which), before.shape[1])
    change = after.float() - before.float()
    counts.index_add_(0, torch.from_numpy(inverse.astype(np.int64)), change)
    up, down = (counts > 0).sum(0).numpy(), (counts < 0).sum(0).numpy()
    return np.minimum(1.0, 2 * binom.cdf(np.minimum(up, down), up + down, 0.5))


def _recovered(
    active: Bool[Tensor, "token latent"],
    active_after: Bool[Tensor, "token latent"],
    before: Float[Tensor, "token d"],
    after: Float[Tensor, "token d"],
    documents: Int[np.ndarray, "token"],
    moved: Int[np.ndarray, "feature"],
) -> dict[str, float]:
    """Median share of the way from the cosine before to 1, over moved features that are active in
    both halves of the documents and in both models."""
    half = torch.from_numpy(documents % 2 == 0)
    active, active_after = active[:, moved], active_after[:, moved]
    sides = [(active[half], half), (active[~half], ~half), (active_after[~half], ~half)]
    n = [each.sum(0).numpy() for each, _ in sides]
    enough = np.flatnonzero(np.minimum.reduce(n) >= _LEAST_ACTIVE // 2)
    if len(enough) < 2:
        return {"cosine": np.nan, **{f"recovered_{a:g}": np.nan for a in ALPHAS}} | {
            "recovered_null": np.nan
        }
    delta = _means(sides[0][0], (after - before)[half], n[0])[enough]
    original = (_means(sides[1][0], before[~half], n[1]) - before.mean(0))[enough]
    tuned = (_means(sides[2][0], after[~half], n[2]) - before.mean(0))[enough]
    cosine = torch.cosine_similarity(original, tuned)

    def share(shift: Tensor) -> float:
        nearer = torch.cosine_similarity(original + shift, tuned)
        return float(((nearer - cosine) / (1 - cosine).clamp_min(1e-9)).median())

    return {
        "cosine": float(cosine.median()),
        **{f"recovered_{alpha:g}": share(alpha * delta) for alpha in ALPHAS},
        "recovered_null": share(delta.roll(1, 0)),
    }


def _fvu(sae: Sae, x: Float[Tensor, "token d"], z: Float[Tensor, "token latent"]) -> float:
    return float((x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum())


def _text(by_site: pd.DataFrame) -> str:
    said = [
        f"  {row.site}: of {row.n_features} features {row.moved} moved, {row.new} new, {row.lost} "
        f"lost; the vectors changed by {row.shift:.1%} of their length; unexplained variance "
        f"{row.fvu_before:.3f} before, {row.fvu_after:.3f} after; recovered by adding the shift "
        f"once {row.recovered_1:.2f} (another feature's {row.recovered_null:.2f})"
        for row in by_site.itertuples()
    ]
    return (
        "A feature moved when the model's vectors changed more where it is active than the same "
        "pattern of activity finds elsewhere in the text. Features are those of the first model's "
        "SAEs: what only the second model has shows as unexplained variance.\n\n" + "\n".join(said)
    )
