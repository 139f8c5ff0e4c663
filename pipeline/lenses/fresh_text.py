"""Do SAEs and links hold on text that nothing was ever tuned on?

The store's held-out rows are a development set: rates, schedules and thresholds were chosen on
them. Here

1. the run's corpus is read on, from behind the documents of the store, and run through the model;
2. at `n_pairs` linked residual pairs, spread over the depth, the variance unexplained by both SAEs
   and the correlation of activations of the kept links are measured on these tokens;
3. beside them the same on the store's held-out rows. A gap is what tuning gained there.

Cost: the model over `n_tokens` tokens. Raises no claim of its own: it says which numbers may be
believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from data.text.corpus import iter_documents
from data.text.packing import pack_documents
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.functional import FEW_FIRINGS, agreement, encode_tokens
from pipeline.lenses.base import LensConfig
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import NPairs, NTokens, residual_pairs, spread
from pipeline.run import Run
from pipeline.stages import collect
from sae import Sae

TITLE = "SAEs and links on text behind that of the store, which nothing was tuned on"
NEEDS = ("collect", "train", "link")
Rows = Mapping[Site, Float[Tensor, "token d_model"]]


class Config(LensConfig):
    """How much text is read."""

    n_pairs: NPairs = 4
    n_tokens: NTokens = 8192


def look(run: Run, config: Config) -> Finding:
    """Measure on fresh text and on the held-out rows. Raises UserError when there is no more
    text."""
    pairs = spread(residual_pairs(run), config.n_pairs)
    sites = sorted({site for pair in pairs for site in pair})
    fresh = _fresh(run, sites, config.n_tokens)
    held_out = run.held_out(len(next(iter(fresh.values()))))
    table = pd.DataFrame(
        _of_pair(run, source, target, text, rows)
        for source, target in pairs
        for text, rows in (
            ("fresh", {site: fresh[site] for site in (source, target)}),
            ("held out", {s: torch.cat(list(held_out(s))) for s in (source, target)}),
        )
    )
    summary = table.groupby("text", sort=False, as_index=False).mean(numeric_only=True)
    by = summary.set_index("text")
    headline = {
        f"{name}_{text.replace(' ', '_')}": round(float(by[name][text]), 4)
        for name in ("fvu", "link_correlation")
        for text in by.index
    }
    n = len(next(iter(fresh.values())))
    return Finding(
        tables={"summary": summary, "pairs": table},
        text=(
            f"On {n} tokens of documents behind those of the store SAEs leave "
            f"{headline['fvu_fresh']:.3f} of the variance unexplained "
            f"({headline['fvu_held_out']:.3f} on the held-out rows, on which rates and schedules "
            f"were chosen), and activations of kept links correlate by "
            f"{headline['link_correlation_fresh']:.3f} "
            f"({headline['link_correlation_held_out']:.3f}). Means over {len(pairs)} pairs."
        ),
        headline=headline,
        figure=lambda: bars(
            table,
            by=["target_site", "text"],
            columns={"fvu": "FVU", "link_correlation": "correlation of kept links"},
        ),
    )


def _fresh(run: Run, sites: list[Site], n_tokens: int) -> Rows:
    """Activations of ordinary tokens of documents that the store has not."""
    how = collect.Config.model_validate(dict(run.artifact("collect").config))
    if how.imported is not None:
        raise UserError("the text of an imported store is not known", where="collect.imported")
    seen = len(run.tokens.documents)
    packed = pack_documents(
        islice(iter_documents(how.corpus, how.seed), seen, None),
        run.model.tokenizer,
        n_context=how.n_context,
        n_tokens=n_tokens,
        seed=None,
        max_document_tokens=how.max_document_tokens,
        keep_special=how.special_tokens == "kept",
        where=f"the text behind the store's {seen} documents",
    )
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for ids in torch.from_numpy(packed.contexts()).split(8):
        run.context.progress("read fresh text", len(parts[sites[0]]) * 8, packed.n_contexts)
        for site, value in run.model.activations(ids, tuple(sites)).items():
            parts[site].append(value.float().flatten(0, 1).cpu())
    rows = {site: torch.cat(values) for site, values in parts.items()}
    keep = torch.from_numpy(packed.flags == 0)
    for value in rows.values():  # tokens with outlying norms are no ordinary ones in the store too
        norms = value.norm(dim=1)
        keep &= norms <= how.sink_ratio * norms.median()
    return {site: value[keep] for site, value in rows.items()}


def _of_pair(run: Run, source: Site, target: Site, text: str, rows: Rows) -> dict[str, Any]:
    codes = {site: encode_tokens(run.saes[site], _batches(rows[site])) for site in rows}
    edges = run.graph.edges
    between = edges[
        (edges["source_site"] == source.short)
        & (edges["target_site"] == target.short)
        & edges["kept"]
        & (edges["rank"] == 0)
    ]
    left, right = (between[f"{end}_latent"].to_numpy() for end in ("source", "target"))
    often = codes[target].n_fired[right] >= FEW_FIRINGS
    found = agreement(codes[source], codes[target], left[often], right[often])
    fvu = [_fvu(run.saes[site], rows[site]) for site in (source, target)]
    return {
        "source_site": source.short,
        "target_site": target.short,
        "text": text,
        "n_tokens": len(rows[target]),
        "fvu": float(np.mean(fvu)),
        "link_correlation": float(np.median(found)) if len(found) else float("nan"),
    }


@torch.no_grad()
def _fvu(sae: Sae, x: Float[Tensor, "token d_model"]) -> float:
    error = sum(float((sae(part) - part).double().square().sum()) for part in x.split(2048))
    return error / float((x.double() - x.double().mean(0)).square().sum())


def _batches(x: Float[Tensor, "token d_model"]) -> Iterable[Float[Tensor, "token d_model"]]:
    return x.split(2048)
