"""An atlas opened for programs: tables as data frames, labels, examples as text; and two atlases
compared.

    atlas = Atlas.open("artifacts/laptop/atlas")
    atlas.features.query("label_accepted and layer == 12").sort_values("density")
    atlas.examples_of("L12/402", tab="top")            texts with the activating token marked

Tables are read when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from featureflow.errors import Command, UserError
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.describe.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from sae import Sae

KIND, SCHEMA = "atlas", SCHEMAS["atlas"]


class Atlas:
    """The tables of an atlas artifact. `features` has one row a feature, in the order of sites and
    latents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> Atlas:
        """Open an atlas artifact. Raises UserError when it is missing, unfinished, or of another
        version."""
        return cls(
            Artifact.open(
                Path(folder), kind=KIND, schema=SCHEMA, fix=Command("run", to="atlas")
            ).path
        )

    @cached_property
    def features(self) -> pd.DataFrame:
        """One row a feature; `layer` and `kind` are those of its site."""
        frame = self._read("features")
        sites = {short: parse_site(short) for short in frame["site"].unique()}
        return frame.assign(
            layer=frame["site"]
            .map({short: site.layer for short, site in sites.items()})
            .astype(int),
            kind=frame["site"].map({short: site.kind for short, site in sites.items()}).astype(str),
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
    def edges(self) -> pd.DataFrame:
        """Kept links of the flow graph. Raises UserError when the atlas was made without one."""
        return self._read("edges")

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
        frame = self._read("vocabulary")
        special = frame.loc[frame["special"], "token"]
        return Vocabulary(tokens=list(frame["bytes"]), special=frozenset(int(t) for t in special))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(parse_site(str(short)) for short in self.features["site"].unique())

    def number(self, feature: FeatureId | str) -> int:
        """The row of a feature in `features`. Raises UserError for one that the atlas does not
        have."""
        wanted = parse_feature(feature) if isinstance(feature, str) else feature
        start, n = self._extent.get(wanted.site.short, (0, 0))
        if not n:
            raise UserError(
                f"the atlas has no site {wanted.site.short}", expected=", ".join(self._extent)
            )
        if wanted.latent >= n:
            raise UserError(
                f"{wanted.site.short} has no latent {wanted.latent}", expected=f"0 … {n - 1}"
            )
        return start + wanted.latent

    def label_of(self, feature: FeatureId | str) -> str:
        """What the pages call the feature; the empty text for one that never fired."""
        return str(self.features["label"].iloc[self.number(feature)])

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
        mine = (
            (table["site"] == wanted.site.short)
            & (table["latent"] == wanted.latent)
            & (table["tab"] == tab)
        )
        chosen = table[mine]
        texts = [self._window(int(row), reach) for row in chosen["row"]]
        names = ("before", "token_text", "after")
        return chosen.assign(
            **{name: [t[i] for t in texts] for i, name in enumerate(names)}
        ).reset_index(drop=True)

    def _window(self, row: int, reach: int) -> tuple[str, str, str]:
        low, high = max(0, row - reach), min(len(self._token), row + reach + 1)
        run = self.runs
        rows = np.arange(low, high)
        rows = rows[run[rows] == run[row]]
        before, after = rows[rows < row], rows[rows > row]
        join, token = self.vocabulary.join, self._token
        return join(token[before].tolist()), join([int(token[row])]), join(token[after].tolist())

    @cached_property
    def _token(self) -> np.ndarray:
        return self.tokens["token"].to_numpy()

    @cached_property
    def runs(self) -> np.ndarray:
        """For every row of `tokens`, the run of consecutive rows of one document that it is in."""
        document, position = self.tokens["document"].to_numpy(), self.tokens["position"].to_numpy()
        change = (np.diff(document) != 0) | (np.diff(position) != 1)
        return np.concatenate([[0], change.cumsum()])

    @cached_property
    def _extent(self) -> dict[str, tuple[int, int]]:
        names, first, counts = np.unique(
            self.features["site"].to_numpy(str), return_index=True, return_counts=True
        )
        return {str(n): (int(f), int(c)) for n, f, c in zip(names, first, counts, strict=True)}

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / "tables" / f"{name}.parquet"
        if not path.is_file():
            raise UserError(
                f"the atlas has no table {name!r}",
                where=str(path),
                fix=Command("atlas", force=True),
            )
        return pq.read_table(path).to_pandas()


def diff_atlases(
    before: Atlas,
    after: Atlas,
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
    import pandas as pd

    common = [
        site
        for site in before.sites
        if site in saes_before and site in saes_after and site in after.sites
    ]
    if not common:
        raise UserError(
            "the two atlases have no site in common",
            expected=", ".join(s.short for s in before.sites),
            found=", ".join(s.short for s in after.sites),
        )
    parts = [
        _diff_site(before, after, site, saes_before[site], saes_after[site], min_cosine)
        for site in common
    ]
    return pd.concat(parts, ignore_index=True)


def _diff_site(
    before: Atlas, after: Atlas, site: Site, old: Sae, new: Sae, min_cosine: float
) -> pd.DataFrame:
    import pandas as pd
    import torch.nn.functional as F

    cosine = (F.normalize(old.W_dec, dim=1) @ F.normalize(new.W_dec, dim=1).T).numpy()
    best_new, best_old = cosine.argmax(axis=1), cosine.argmax(axis=0)
    strength = cosine.max(axis=1)
    matched = (best_old[best_new] == np.arange(len(cosine))) & (strength >= min_cosine)
    a, b = _features_at(before, site), _features_at(after, site)
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


def _features_at(atlas: Atlas, site: Site) -> pd.DataFrame:
    return atlas.features[atlas.features["site"] == site.short].reset_index(drop=True)
