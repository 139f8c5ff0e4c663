"""Questions to described features: which are about a word, and which are active on a text of one's
own.

`find_features` looks for a word in labels, in the tokens a feature is active on most, and in those
it promotes; matches begin at the start of a word, letter case is ignored. Accepted labels come
first, by held-out score. `read_text` runs the run's model over a text and gives, for every token,
the strongest latents of one dictionary, with their activation as a share of the feature's largest
on the corpus. The BOS is left out: its norm is far from all else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.model.language_model import LanguageModel
from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, residual_sites
from pipeline.describe.features import Features
from sae import Sae

_PLACES = ("label", "tokens", "promotes")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A feature that a word was found at; `where` says in what: its label, tokens it is active on,
    tokens it promotes."""

    feature: str
    where: tuple[str, ...]
    label: str
    accepted: bool
    score: float
    density: float


@dataclass(frozen=True, kw_only=True)
class ActiveLatent:
    """A latent on one token: its activation, and that as a share of the feature's largest on the
    corpus."""

    feature: FeatureId
    value: float
    share: float
    label: str


@dataclass(frozen=True, kw_only=True)
class ReadToken:
    """One token of a text and the strongest activations there."""

    text: str
    active: tuple[ActiveLatent, ...]


def find_features(features: Features, word: str, *, site: Site | None = None) -> list[Found]:
    """All features that the word is found at, best first. Raises UserError for an empty word or an
    unknown site."""
    if not word.strip():
        raise UserError("the word is empty", expected="a word, or the beginning of one")
    if site is not None:
        features.number(FeatureId(site, 0))
    pattern = re.compile(rf"(?<!\w){re.escape(word.strip())}", re.IGNORECASE)
    frame = features.table if site is None else features.at(site.short)
    found = [
        each
        for row in frame[frame["alive"]].to_dict(orient="records")
        if (each := _found(row, pattern)) is not None
    ]
    return sorted(
        found,
        key=lambda f: (
            not (f.accepted and "label" in f.where),
            _PLACES.index(f.where[0]),
            -f.score,
        ),
    )


def _found(row: dict[str, Any], pattern: re.Pattern[str]) -> Found | None:
    texts = {"label": [row["label"]], "tokens": row["tokens"], "promotes": row["promotes"]}
    where = tuple(
        place for place in _PLACES if any(pattern.search(str(text)) for text in texts[place])
    )
    if not where:
        return None
    score = float(row["label_score"])
    return Found(
        feature=row["feature"],
        where=where,
        label=row["label"],
        accepted=bool(row["label_accepted"]),
        score=score if score == score else 0.0,
        density=float(row["density"]),
    )


def read_text(
    model: LanguageModel,
    features: Features,
    saes: Mapping[Site, Sae],
    text: str,
    *,
    site: Site | None = None,
    n: int = 3,
) -> list[ReadToken]:
    """The tokens of a text with the `n` strongest latents at a site (the middle residual one).

    Raises UserError for an empty or too long text and for a site without a dictionary."""
    where = site or middle_site(features.sites)
    features.number(FeatureId(where, 0))
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text)]
    if not 1 < len(ids) <= model.n_context:
        expected = f"1 … {model.n_context - 1} tokens"
        raise UserError(
            "the text is empty or too long", found=f"{len(ids) - 1} tokens", expected=expected
        )
    activations = model.activations(torch.tensor([ids]), [where])[where][0].float().cpu()
    codes = saes[where].encode(activations)[1:]
    pieces = [model.tokenizer.token_text(i) for i in ids[1:]]
    return [
        ReadToken(text=piece, active=tuple(_strongest(features, where, z, n)))
        for piece, z in zip(pieces, codes, strict=True)
    ]


def middle_site(sites: Sequence[Site]) -> Site:
    """The residual site in the middle; where there is none, the middle one of all."""
    residual = residual_sites(sites) or list(sites)
    return residual[len(residual) // 2]


def _strongest(features: Features, site: Site, z: torch.Tensor, n: int) -> Iterator[ActiveLatent]:
    value, latent = z.topk(min(n, len(z)))
    for a, index in zip(value.tolist(), latent.tolist(), strict=True):
        if a > 0:
            row = features.table.iloc[features.number(FeatureId(site, index))]
            largest = float(row["max"])
            share = a / largest if largest > 0 else float("inf")
            yield ActiveLatent(
                feature=FeatureId(site, index), value=a, share=share, label=str(row["label"])
            )
