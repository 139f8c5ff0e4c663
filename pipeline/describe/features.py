"""What the describe stage left, opened for programs: tables as data frames, labels, examples as
text, cards; and the features of two runs compared.

    features = Features.open("artifacts/laptop/describe")
    features.table.query("label_accepted and layer == 12").sort_values("density")
    features.examples_of("L12/402", tab="top")         texts with the activating token marked
    features.card("L12/402").examples[0].values        what a page shows, as Python values

Tables are read when they are first asked for; what belongs to one site is read site by site.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch.nn.functional as F

from featureflow.errors import Command, UserError
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.describe.cards import Card, card_of
from pipeline.describe.columns import Columns
from pipeline.describe.corpus import PARTS, Corpus
from pipeline.describe.labels import Label
from pipeline.describe.tables import read_vocabulary
from pipeline.describe.vocabulary import Vocabulary
from sae.dictionary import Sae

KIND, SCHEMA = "describe", SCHEMAS["describe"]
ABOUT, SITES = "about.json", "sites"


class Features:
    """A describe artifact. `table` has one row a feature, in the order of sites and latents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at = lru_cache(maxsize=2)(self._at)
        self.columns = lru_cache(maxsize=2)(self._columns)
        self.labels_at = lru_cache(maxsize=2)(self._labels_at)

    @classmethod
    def open(cls, folder: str | Path) -> Features:
        """Open a describe artifact. Raises UserError when it is missing, unfinished, or of another
        version."""
        return cls(Artifact.open(Path(folder), kind=KIND, schema=SCHEMA).path)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the features are of: `model`, names of `sources` and `labels` of documents,
        `filters`, `n_sites`."""
        return json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a feature; `layer` and `kind` are those of its site."""
        frame = self._read("features")
        layer = {site.short: site.layer for site in self.sites}
        kind = {site.short: site.kind for site in self.sites}
        return frame.assign(
            layer=frame["site"].map(layer).astype(int), kind=frame["site"].map(kind).astype(str)
        )

    @cached_property
    def labels(self) -> pd.DataFrame:
        """One row a label, the best of each feature first."""
        return self._read("labels")

    @cached_property
    def examples(self) -> pd.DataFrame:
        """One row an example; `row` points into `tokens`."""
        return self._read("examples")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row a token of the corpus."""
        return self._read("tokens")

    @cached_property
    def documents(self) -> pd.DataFrame:
        """One row a document: title, source, label."""
        return self._read("documents")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token."""
        return read_vocabulary(self._path("vocabulary"))

    @cached_property
    def corpus(self) -> Corpus:
        """The text that the features are described from."""
        tokens, documents = self.tokens, self.documents
        names = {key: tuple(self.about[key]) for key in ("sources", "labels")}
        place = {key: {n: i for i, n in enumerate(values)} for key, values in names.items()}
        return Corpus(
            **{name: tokens[name].to_numpy() for name in ("token", "document", "position", "kept")},
            part=tokens["part"].map(PARTS.index).to_numpy(np.uint8),
            titles=tuple(documents["title"]),
            document_source=documents["source"].map(place["sources"]).to_numpy(np.int32),
            document_label=documents["label"].map(place["labels"]).fillna(-1).to_numpy(np.int32),
            sources=names["sources"],
            labels=names["labels"],
            vocabulary=self.vocabulary,
            images=tuple(documents["image"]) if "image" in documents else (),
        )

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return tuple(parse_site(short) for short in self._extent)

    def number(self, feature: FeatureId | str) -> int:
        """The row of a feature in `table`. Raises UserError for one that there is not."""
        wanted = parse_feature(feature) if isinstance(feature, str) else feature
        if wanted.site not in self.sites:
            known = ", ".join(self._extent)
            raise UserError(f"no features are described at {wanted.site.short}", expected=known)
        start, stop = self._extent[wanted.site.short]
        if wanted.latent >= stop - start:
            what = f"{wanted.site.short} has no latent {wanted.latent}"
            raise UserError(what, expected=f"0 … {stop - start - 1}")
        return start + wanted.latent

    def label_of(self, feature: FeatureId | str) -> str:
        """What the pages call the feature; the empty text for one that is never active."""
        return str(self.table["label"].iloc[self.number(feature)])

    def labels_of(self, feature: FeatureId | str) -> pd.DataFrame:
        """All labels of a feature with their scores, best first."""
        return self.labels[self.labels["feature"] == str(feature)].sort_values("rank")

    def examples_of(
        self, feature: FeatureId | str, *, tab: str = "top", reach: int = 16
    ) -> pd.DataFrame:
        """Examples with `before`, `token_text` and `after` as text, at most `reach` tokens each
        way."""
        self.number(feature)
        wanted = parse_feature(feature) if isinstance(feature, str) else feature
        table = self.examples
        mine = (table["site"] == wanted.site.short) & (table["latent"] == wanted.latent)
        chosen = table[mine & (table["tab"] == tab)].reset_index(drop=True)
        texts = [self._window(int(row), reach) for row in chosen["row"]]
        names = ("before", "token_text", "after")
        return chosen.assign(**{name: [t[i] for t in texts] for i, name in enumerate(names)})

    def card(self, feature: FeatureId | str) -> Card:
        """Everything about one feature. Raises UserError for one that there is not."""
        self.number(feature)
        wanted = parse_feature(feature) if isinstance(feature, str) else feature
        short, latent = wanted.site.short, wanted.latent
        labels = self.labels_at(short)[latent]
        return card_of(wanted, self.columns(short), labels, self.corpus)

    def cards_at(self, short: str) -> Iterator[Card]:
        """All cards of a site in order."""
        start, stop = self._extent[short]
        for latent in range(stop - start):
            yield self.card(FeatureId(parse_site(short), latent))

    def _at(self, short: str) -> pd.DataFrame:
        """The rows of `table` of one site."""
        return self._read("features", filters=[("site", "==", short)])

    def _columns(self, short: str) -> Columns:
        """The cards' numbers of one site, a row a latent."""
        with np.load(self.folder / SITES / f"{short}.npz", allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _labels_at(self, short: str) -> list[list[Label]]:
        """The labels of every latent of one site, best first."""
        rows = pq.read_table(self._path("labels"), filters=[("site", "==", short)])
        start, stop = self._extent[short]
        made: list[list[Label]] = [[] for _ in range(stop - start)]
        names = [f.name for f in fields(Label) if f.name in rows.column_names]
        for row in rows.select(["latent", *names]).to_pylist():
            latent = row.pop("latent")
            made[latent].append(Label(**{name: _rounded(value) for name, value in row.items()}))
        return made

    def _window(self, row: int, reach: int) -> tuple[str, str, str]:
        token, rows = self.corpus.token, self.corpus.window(row, reach)
        join = self.vocabulary.join
        before, after = rows[rows < row], rows[rows > row]
        return join(token[before].tolist()), join([int(token[row])]), join(token[after].tolist())

    @cached_property
    def _extent(self) -> dict[str, tuple[int, int]]:
        """First and last row of every site in `table`."""
        site = pq.read_table(self._path("features"), columns=["site"]).column("site")
        names, first, counts = np.unique(
            site.to_numpy(zero_copy_only=False).astype(str), return_index=True, return_counts=True
        )
        order = np.argsort(first)
        return {str(names[i]): (int(first[i]), int(first[i] + counts[i])) for i in order}

    def _path(self, name: str) -> Path:
        path = self.folder / "tables" / f"{name}.parquet"
        if not path.is_file():
            fix = Command("describe", force=True)
            raise UserError(f"there is no table {name!r}", where=str(path), fix=fix)
        return path

    def _read(self, name: str, filters: Any = None) -> pd.DataFrame:
        frame = pq.read_table(self._path(name), filters=filters).to_pandas()
        return frame.rename(columns={"n_firings": "n_active"})  # as earlier versions wrote it


def diff_features(
    before: Features,
    after: Features,
    saes_before: Mapping[Site, Sae],
    saes_after: Mapping[Site, Sae],
    *,
    min_cosine: float = 0.7,
) -> pd.DataFrame:
    """Features of two runs, seeds or fine-tunes matched by decoder direction, site by site.

    A pair is a *match* when each is the other's closest and their cosine reaches `min_cosine`; the
    rest is *gone* or *new*. One row a feature or pair: status, both ids, cosine, both labels, both
    densities. Costs one product of `latent × latent × d_model` a site. Raises UserError when no
    site is in both."""
    common = [
        site
        for site in before.sites
        if site in saes_before and site in saes_after and site in after.sites
    ]
    if not common:
        raise UserError(
            "the two runs have no site in common",
            expected=", ".join(s.short for s in before.sites),
            found=", ".join(s.short for s in after.sites),
        )
    parts = [
        _diff_site(before, after, site, saes_before[site], saes_after[site], min_cosine)
        for site in common
    ]
    return pd.concat(parts, ignore_index=True)


def _diff_site(
    before: Features, after: Features, site: Site, old: Sae, new: Sae, min_cosine: float
) -> pd.DataFrame:
    cosine = (F.normalize(old.W_dec, dim=1) @ F.normalize(new.W_dec, dim=1).T).numpy()
    best_new, best_old = cosine.argmax(axis=1), cosine.argmax(axis=0)
    strength = cosine.max(axis=1)
    matched = (best_old[best_new] == np.arange(len(cosine))) & (strength >= min_cosine)
    a, b = before.at(site.short), after.at(site.short)
    alive_a, alive_b = a["alive"].to_numpy(), b["alive"].to_numpy()
    pairs = np.flatnonzero(matched & alive_a & alive_b[best_new])
    gone = np.setdiff1d(np.flatnonzero(alive_a), pairs)
    fresh = np.setdiff1d(np.flatnonzero(alive_b), best_new[pairs])
    left = np.concatenate([pairs, gone, np.full(len(fresh), -1)])
    right = np.concatenate([best_new[pairs], np.full(len(gone), -1), fresh])
    columns: dict[str, object] = {
        "site": site.short,
        "status": np.repeat(["match", "gone", "new"], [len(pairs), len(gone), len(fresh)]),
        "cosine": np.concatenate([strength[pairs], strength[gone], cosine.max(axis=0)[fresh]]),
    }
    for side, frame, index in (("before", a, left), ("after", b, right)):
        for name in ("feature", "label", "density"):
            values = frame[name].to_numpy(object)[np.maximum(index, 0)]
            columns[f"{name}_{side}"] = np.where(index >= 0, values, None)
    return pd.DataFrame(columns)


def _rounded(value: Any) -> Any:
    """Scores as they were before they became float32."""
    return round(value, 4) if isinstance(value, float) else value
