"""Which features make a feature active, by one backward pass instead of one removal each?

1. On held-out contexts, an active target is drawn on every token, with a random sign. One backward
   pass of the signed sum of pre-activations gives g at the source site; times the sign, what comes
   from other tokens averages out.
2. An active source's effect is z_i d_i·g (gradient × activation). Its mean over the tokens where
   both ends of a link are active is the link's `gradient_effect`; `share` is the mean over the
   target's pre-activation.
3. Check by real removal: for some targets, active sources are taken off one at a time. Rank
   correlation over sources of the real change with the gradient of this target alone, with that
   of the shared pass (2), with the link's cosine, with the source's activation; intervals over
   documents. Null: the gradient of another target.

Cost: a pass over the blocks between two sites, forward and back, `n_rounds` times over `n_tokens`;
eight rows of a forward pass a checked target. Source: Achtibat et al. 2024, AttnLRP (arXiv
2402.05602), whose rules are patented and not built here; in a prototype the plain gradient agreed
better with removal (0.975 against 0.844 over four layers).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from data.model.partial_forward import continued_from
from featureflow.sites import Site, residual_sites
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.gradients import gradients_between
from pipeline.lenses.parts.held_out import Contexts, choose_contexts
from pipeline.lenses.parts.layers import layers_of, spread
from pipeline.run import Run
from sae import Sae

TITLE = "which features make a feature active: gradient × activation, checked by removal"
NEEDS = ("collect", "train", "link")
WAYS = ("gradient", "shared pass", "cosine", "activation", "another target")
_BATCH = 8
_AXES = {"spearman": "rank correlation with removal"}


class Config(Sampled):
    """How many pairs of layers, on how much text, and how much is checked."""

    n_pairs: Annotated[int | None, Ge(1), Doc("pairs of neighbours; none for all")] = 6
    gaps: Annotated[tuple[int, ...], Doc("layers between the ends of checked pairs")] = (1, 4)
    n_tokens: Annotated[int, Ge(1), Doc("held-out tokens that targets are drawn on")] = 2048
    n_rounds: Annotated[int, Ge(1), Doc("targets drawn on every token")] = 4
    n_checked: Annotated[int, Ge(0), Doc("targets a pair whose sources are removed")] = 16
    n_sources: Annotated[int, Ge(3), Doc("active sources removed for each of them")] = 8


def look(run: Run, config: Config) -> Finding:
    """Effects of links, and how well gradient, cosine and activation agree with removal."""
    contexts = choose_contexts(run, config, config.n_tokens)
    linked = {
        (layer.links["residual"].source, layer.target): layer.links["residual"].best
        for layer in layers_of(run)
        if "residual" in layer.links
    }
    pairs = spread(list(linked), config.n_pairs or len(linked))
    edges, checks = [], []
    stream = residual_sites(run.saes)
    for source, _ in run.each("attribute", pairs):
        for gap in config.gaps:
            place = stream.index(source) + gap
            if place >= len(stream):
                continue
            end = stream[place]
            pair = Pair.of(run, source, end, contexts, config)
            if (source, end) in linked:
                edges.append(pair.links(linked[source, end]))
            checks.append(pair.checked().assign(gap=gap))
    effects = pd.concat(edges, ignore_index=True) if edges else pd.DataFrame()
    trials = pd.concat(checks, ignore_index=True)
    summary = _summary(trials, config.seed)
    return Finding(
        tables={"agreement": summary, "edges": effects, "trials": trials},
        figure=(lambda: bars(summary, by=["gap", "way"], columns=_AXES)) if len(summary) else None,
        text=_text(summary, effects),
        headline={
            f"{row.way}, gap {row.gap}": round(float(row.spearman), 4)
            for row in summary.itertuples()
        },
    )


class Pair:
    """Two sites on the same contexts: activations, codes, and gradients of drawn targets."""

    def __init__(
        self,
        run: Run,
        source: Site,
        target: Site,
        contexts: Contexts,
        values: dict[Site, Tensor],
        config: Config,
    ) -> None:
        self.run, self.source, self.target, self.config = run, source, target, config
        self.contexts, self.h = contexts, values[source]
        self.saes: tuple[Sae, Sae] = (run.saes[source], run.saes[target])
        self.z = self.saes[0].encode(values[source])
        self.pre = self.saes[1].pre_activations(values[target])
        self.y = self.saes[1].encode(values[target])
        rng = np.random.default_rng([config.seed, source.layer, target.layer])
        self.rng = rng
        self.drawn = [self._drawn() for _ in range(config.n_rounds)]

    @classmethod
    def of(cls, run: Run, source: Site, target: Site, contexts: Contexts, config: Config) -> Pair:
        with torch.no_grad():
            parts = [
                run.exact_model.activations(ids, (source, target))
                for ids in contexts.ids.split(_BATCH)
            ]
        values = {site: torch.cat([part[site] for part in parts]) for site in (source, target)}
        return cls(run, source, target, contexts, values, config)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """A target on every token (-1: none is active), and the gradient of its pre-activation on
        that token."""
        score = torch.from_numpy(self.rng.random(self.y.shape)).float() * (self.y > 0)
        best = score.max(-1)
        latent = torch.where((best.values > 0) & self.contexts.spliced, best.indices, -1)
        sign = torch.from_numpy(self.rng.choice([-1.0, 1.0], latent.shape)).float()
        sign = sign * (latent >= 0)
        found = []
        for h, chosen, weight in zip(
            self.h.split(_BATCH), latent.split(_BATCH), sign.split(_BATCH), strict=True
        ):
            rows = self.saes[1].W_enc[chosen.clamp(min=0)] * weight[..., None]

            def signed(value: Tensor, rows: Tensor = rows) -> Tensor:
                return (value * rows).sum()

            g = gradients_between(self.run.exact_model, h, self.source, self.target, signed)
            found.append(g * weight[..., None])
        return latent, torch.cat(found)

    def effects(self, latent: Tensor, g: Tensor) -> Float[Tensor, "row source"]:
        """z_i d_i·g of every source, on the tokens that have a target."""
        has = latent >= 0
        return self.z[has] * (g[has] @ self.saes[0].W_dec.T)

    def links(self, best: np.ndarray) -> pd.DataFrame:
        """Mean effect of every best link over the tokens where both ends are active."""
        frames = []
        for latent, g in self.drawn:
            has = latent >= 0
            target = latent[has]
            source = torch.from_numpy(best)[target]
            rows = torch.arange(len(target))
            effect = self.effects(latent, g)[rows, source.clamp(min=0)]
            frames.append(
                pd.DataFrame(
                    {
                        "target": target.numpy(),
                        "source": source.numpy(),
                        "effect": effect.numpy(),
                        "pre": self.pre[has][rows, target].numpy(),
                        "active": self.z[has][rows, source.clamp(min=0)].numpy() > 0,
                    }
                )
            )
        table = pd.concat(frames)
        table = table[table["active"] & (table["source"] >= 0)]
        groups = table.groupby(["source", "target"])
        mean = groups.agg(effect=("effect", "mean"), pre=("pre", "mean"), n=("effect", "size"))
        mean = mean.reset_index()
        return pd.DataFrame(
            {
                "source_feature": [f"{self.source.short}/{i}" for i in mean["source"]],
                "target_feature": [f"{self.target.short}/{i}" for i in mean["target"]],
                "gradient_effect": mean["effect"],
                "share": mean["effect"] / mean["pre"],
                "n": mean["n"],
            }
        )

    def checked(self) -> pd.DataFrame:
        """Active sources of some targets, each removed: the real change beside what scores say."""
        latent, shared = self.drawn[0]
        places = (latent >= 0).nonzero()
        if not len(places) or not self.config.n_checked:
            return pd.DataFrame()
        chosen = self.rng.permutation(len(places))[: self.config.n_checked]
        alone = self._alone(places[chosen], latent)
        frames = []
        for number, (context, token) in enumerate(places[chosen].tolist()):
            target, z = int(latent[context, token]), self.z[context, token]
            active = z.nonzero().squeeze(1).numpy()
            sources = torch.from_numpy(
                self.rng.permutation(active)[: self.config.n_sources].astype(np.int64)
            )
            d = self.saes[0].W_dec[sources]
            removed = z[sources, None] * d
            frames.append(
                pd.DataFrame(
                    {
                        "pair": f"{self.source.short} → {self.target.short}",
                        "number": number,
                        "document": int(self.contexts.documents[context, token]),
                        "removal": self._removed(context, token, target, removed).numpy(),
                        "gradient": (removed @ alone[number]).numpy(),
                        "shared pass": (removed @ shared[context, token]).numpy(),
                        "cosine": torch.cosine_similarity(
                            d, self.saes[1].W_dec[target][None]
                        ).numpy(),
                        "activation": z[sources].numpy(),
                        "another target": (removed @ alone[number - 1]).numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def _alone(self, places: Tensor, latent: Tensor) -> Float[Tensor, "target d_model"]:
        """The gradient of one target a context."""
        found = []
        for part in places.split(_BATCH):
            context, token = part.T
            rows, at = self.saes[1].W_enc[latent[context, token]], torch.arange(len(part))

            def summed(
                value: Tensor, at: Tensor = at, token: Tensor = token, rows: Tensor = rows
            ) -> Tensor:
                return (value[at, token] * rows).sum()

            g = gradients_between(
                self.run.exact_model, self.h[context], self.source, self.target, summed
            )
            found.append(g[at, token])
        return torch.cat(found)

    @torch.no_grad()
    def _removed(
        self, context: int, token: int, target: int, removed: Float[Tensor, "source d_model"]
    ) -> Float[Tensor, "source"]:
        """How much of the target's pre-activation goes when each source is taken off."""
        h = self.h[context, : token + 1].expand(len(removed), -1, -1).clone()
        h[:, token] -= removed
        model = self.run.exact_model
        with continued_from(model, self.source.layer, h):
            ids = torch.zeros(h.shape[:2], dtype=torch.int64)
            value = model.activations(ids, [self.target])[self.target][:, token]
        pre = self.saes[1].pre_activations(value)[:, target]
        return self.pre[context, token, target] - pre


def _summary(trials: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Per gap and score: rank correlation with removal, and how often it finds the strongest."""
    rows = []
    for gap, part in trials.groupby("gap") if len(trials) else []:
        groups = [each for _, each in part.groupby(["pair", "number"]) if len(each) > 2]
        document = np.array([each["document"].iloc[0] for each in groups])
        for way in WAYS:
            rank = [scipy.stats.spearmanr(g["removal"], g[way]).statistic for g in groups]
            top = [float(g["removal"].argmax() == g[way].argmax()) for g in groups]
            row: dict[str, Any] = {"gap": gap, "way": way, "n_targets": len(groups)}
            row |= named("spearman", mean_over(np.array(rank), document, seed=seed))
            rows.append(row | named("strongest", mean_over(np.array(top), document, seed=seed)))
    return pd.DataFrame(rows)


def _text(summary: pd.DataFrame, effects: pd.DataFrame) -> str:
    said = [
        f"  {row.gap} layers, {row.way}: {ranged(row, 'spearman', '.3f')}, "
        f"strongest found {row.strongest:.2f}"
        for row in summary.itertuples()
    ]
    share = f"{effects['share'].median():.2f}" if len(effects) else "unknown"
    return (
        "What the paper saw (abstract only): relevance rules are more faithful than gradient "
        "methods on Llama 2, Flan-T5 and ViT.\n\n"
        "What this model shows, rank correlation of the real removal of sources with each score "
        "(95 % intervals over documents):\n"
        + "\n".join(said)
        + f"\nThe best link's source gives a median share of {share} of its target's "
        f"pre-activation ({len(effects)} links)."
    )
