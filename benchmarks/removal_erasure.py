"""What is left of a feature when more is removed than its flow: `python -m
benchmarks.removal_erasure artifacts/laptop --out removal-erasure`.

1. Features are those of the lens `removal`. Fitted on training rows, at every residual site: the
   difference of means d between tokens with and without the feature, the linear probe w, and the
   eight latents whose activations carry most of what w reads.
2. `carried.parquet`: the share of what w reads that is carried by the feature itself at its own
   site, by its flow's member one and eight layers on, and by the best latents; on rows that chose
   nothing.
3. `left.parquet`, `effects.parquet`: what readers find eight layers on and at the end, and what it
   costs, under arms that act only where the feature is active: the eight latents, the oblique
   erasure h − d (w·(h − m))/(w·d) with m the mean of silent tokens, the plain projections of d and
   of the feature's own row. They act at the feature's layer, or from there to the layer before the
   first reader (`…`). Beside them the arms of `steering/removal.py`.

Readers are fitted at other sites than arms act on. Cost: about 20 s of processor time a feature.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from featureflow.sites import FeatureId, Site
from pipeline.context import RunContext
from pipeline.lenses import removal as lens
from pipeline.lenses.steering import removal_trial as trial
from pipeline.run import Run
from pipeline.training.reading import read_rows
from steering import removal
from steering.dose import NeutralText, scored, steered_log_probs
from steering.sequences import arriving, forward, resumed

AHEAD, K, RIDGE, N_TOKENS = 8, 8, 1e-3, 96
Hooks = dict[Site, Callable[[Tensor], Tensor]]


class Erasure:
    """Directions and latents of every feature at every site."""

    def __init__(self, run: Run, features: Sequence[FeatureId]) -> None:
        self.run, self.features, self.sites = run, features, list(run.steering.saes)
        rows = run.store.kept_rows("train")[:16384]
        active = {f: a > 0 for f, a in trial._activity(run, features, rows).items()}
        self.directions: dict[tuple[FeatureId, Site], tuple[Tensor, Tensor, Tensor]] = {}
        self.latents: dict[tuple[FeatureId, Site], list[int]] = {}
        self.carried: list[dict[str, object]] = []
        for site in self.sites:
            here = [f for f in features if f.site <= site]
            if here:
                self._read(site, here, read_rows(run.store, site, rows), active)

    def _read(
        self, site: Site, features: Sequence[FeatureId], x: Tensor, active: dict[FeatureId, Tensor]
    ) -> None:
        sae, n = self.run.saes[site], len(x) * 2 // 3
        z = sae.encode(x)
        for feature in features:
            on = active[feature]
            d, w, silent = _fitted(x, on)
            self.directions[feature, site] = d, w, silent
            carries = (z[on].mean(0) - z[~on].mean(0)) * (sae.W_dec @ w)
            self.latents[feature, site] = carries.topk(K).indices.tolist()
            if site.layer - feature.site.layer in (0, 1, AHEAD) and on[n:].sum() >= 5:
                self.carried.append(self._carried(feature, site, x, z, on, n))

    def _carried(
        self, feature: FeatureId, site: Site, x: Tensor, z: Tensor, on: Tensor, n: int
    ) -> dict[str, object]:
        """Fitted and ranked on the first rows, measured on the rest."""
        sae = self.run.saes[site]
        _, w, _ = _fitted(x[:n], on[:n])
        parts = sae.W_dec @ w
        rank = ((z[:n][on[:n]].mean(0) - z[:n][~on[:n]].mean(0)) * parts).argsort(descending=True)
        yes, no = on[n:], ~on[n:]
        signal = float((x[n:][yes] @ w).mean() - (x[n:][no] @ w).mean())
        share = (z[n:][yes].mean(0) - z[n:][no].mean(0)) * parts / signal
        steps = trial.flow_of(self.run, feature).steps
        member = next((step.latent for step, _ in steps if step.site == site), None)
        row: dict[str, object] = {
            "feature": str(feature), "ahead": site.layer - feature.site.layer, "n": int(yes.sum())
        }  # fmt: skip
        row |= {f"best {k}": float(share[rank[:k]].sum()) for k in (1, 3, 8, 32)}
        row["all latents"] = float(share.sum())
        if member is not None:
            row["member"] = float(share[member])
            row["member active"] = float((z[n:][yes][:, member] > 0).float().mean())
        return row

    def arms(self, feature: FeatureId, grid: Tensor) -> dict[str, Hooks]:
        """What each arm does at its sites; `grid`: the tokens on which the feature is active."""
        own = feature.site
        sites = [s for s in self.sites if own.layer <= s.layer < own.layer + AHEAD]

        def erase(site: Site, strength: float) -> Callable[[Tensor], Tensor]:
            d, w, silent = self.directions[feature, site]
            return _less(grid, d, w / (w @ d), silent, strength)

        def means(site: Site, strength: float) -> Callable[[Tensor], Tensor]:
            d, _, silent = self.directions[feature, site]
            return _less(grid, d / d.norm(), d / d.norm(), silent, strength)

        def row(site: Site) -> Callable[[Tensor], Tensor]:
            u = self.run.saes[own].W_dec[feature.latent]
            _, _, silent = self.directions[feature, own]
            return _less(grid, u / u.norm(), u / u.norm(), silent, 1.0)

        def latents(site: Site) -> Callable[[Tensor], Tensor]:
            mine = {feature.latent} if site == own else set()
            return self._without(site, sorted({*self.latents[feature, site], *mine}), grid)

        return {
            "8 latents": {own: latents(own)},
            "8 latents …": {site: latents(site) for site in sites},
            **{f"erased, {s:g}": {own: erase(own, s)} for s in (0.5, 1.0, 2.0)},
            **{f"erased …, {s:g}": {at: erase(at, s) for at in sites} for s in (0.5, 1.0)},
            "erased …, every third": {site: erase(site, 1.0) for site in sites[::3]},
            **{f"means, {s:g}": {own: means(own, s)} for s in (1.0, 2.0)},
            "means …, 1": {site: means(site, 1.0) for site in sites},
            "own row …, 1": {site: row(site) for site in sites},
        }

    def _without(
        self, site: Site, latents: Sequence[int], grid: Tensor
    ) -> Callable[[Tensor], Tensor]:
        sae = self.run.saes[site]

        def edit(h: Tensor) -> Tensor:
            flat = h.float().reshape(-1, h.shape[-1])
            a = sae.encode_selected(flat, list(latents)).view(*h.shape[:-1], -1)
            return (h.float() - (a @ sae.W_dec[list(latents)]) * grid[..., None]).to(h.dtype)

        return edit


def main() -> None:
    """Measure, and write the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--features", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run.open(arguments.artifacts, context=RunContext(n_threads=1))
    drawn, _ = lens._drawn(run, lens.Config(n_features=arguments.features))
    features = sorted(drawn, key=lambda f: -f.site.layer)
    erasure = Erasure(run, features)
    pd.DataFrame(erasure.carried).to_parquet(arguments.out / "carried.parquet")
    amount = trial.Amount(n_with=3, n_without=1, n_positions=N_TOKENS)
    readers = trial._readers(run, features, AHEAD, amount, {})
    left: list[dict[str, object]] = []
    effects: list[dict[str, object]] = []
    for feature in features:
        found = _measured(run, erasure, feature, readers[feature], amount)
        left += found[0]
        effects += found[1]
        pd.DataFrame(left).to_parquet(arguments.out / "left.parquet")
        pd.DataFrame(effects).to_parquet(arguments.out / "effects.parquet")
        print(feature, flush=True)
    print(summary_of(pd.DataFrame(left), pd.DataFrame(effects)).round(3).to_string())


def summary_of(left: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """By arm: mean left for readers that tell the feature (AUROC ≥ 0.75), and KL by place."""
    kept = left[left["auroc"] >= trial.LEAST_AUROC].assign(left=left["left"].clip(-1, 2))
    told = kept.pivot_table(index="arm", columns="reader", values="left", sort=False)
    costs = effects.pivot_table(index="arm", columns="where", values="kl", sort=False)
    return told.join(costs.add_prefix("KL "))


def _measured(
    run: Run,
    erasure: Erasure,
    feature: FeatureId,
    readers: Sequence[removal.Reader],
    amount: trial.Amount,
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    model, saes = run.steering.model, run.steering.saes
    held = trial.Held(run=run, n_positions=N_TOKENS)
    contexts = trial._contexts(held, feature, amount)
    means = {site: torch.from_numpy(run.store.statistics(site).mean) for site in saes}
    plans = trial._arms(run, trial.flow_of(run, feature), means, amount.seed)
    sites = sorted({feature.site, *(reader.site for reader in readers)})
    with arriving(model, sites) as seen:
        text = NeutralText.prepare(model, [tuple(row) for row in contexts], n_tokens=N_TOKENS)
        clean = {site: scored(h, text.batch).float() for site, h in seen.items()}
    where = removal._kinds_of_token(saes[feature.site], feature, clean[feature.site], text)
    before = removal._readings(clean, text.log_probs, readers, ())
    grid = torch.zeros(text.batch.ids.shape, dtype=torch.bool)
    grid[removal.scored_places(text)] = where["active"]
    hooks = erasure.arms(feature, grid)
    left, effects = [], []
    for arm in [*plans, *hooks]:
        with arriving(model, sites) as seen:
            if arm in plans:
                log_probs = steered_log_probs(model, saes, plans[arm], text)
            else:
                with model.edited(hooks[arm]), resumed(model, text.blocks, feature.site.layer):
                    logits = scored(forward(model, text.batch), text.batch)
                log_probs = logits.float().log_softmax(-1)
            here = {site: scored(h, text.batch).float() for site, h in seen.items()}
        after = removal._readings(here, log_probs, readers, ())
        left += list(removal._left(arm, readers, before, after, where))
        effects += list(removal._effects(arm, text, log_probs, where))
    about = {"feature": str(feature)}
    return tuple([about | removal.as_record(row) for row in rows] for rows in (left, effects))


def _fitted(x: Tensor, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d, w, the mean of silent rows)."""
    centred, label = x - x.mean(0), on.float() - on.float().mean()
    d = centred.T @ label / len(x)
    covariance = centred.T @ centred / len(x)
    ridge = RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    return d, torch.linalg.solve(covariance + ridge, d), x[~on].mean(0)


def _less(
    grid: Tensor, along: Tensor, reading: Tensor, silent: Tensor, strength: float
) -> Callable[[Tensor], Tensor]:
    """h less `along` × what `reading` finds above silent tokens, where the grid says so."""

    def edit(h: Tensor) -> Tensor:
        above = ((h.float() - silent) @ reading).clamp(min=0)
        return (h.float() - (strength * above * grid)[..., None] * along).to(h.dtype)

    return edit


if __name__ == "__main__":
    main()
