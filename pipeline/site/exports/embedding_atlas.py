"""Features as points: the Parquet file that embedding-atlas opens (`x`, `y`, `text`, `neighbors`,
and our columns).

Coordinates are the two first principal components of the decoder directions, all sites together;
distances between near features are in `neighbors` (ids and cosine distances inside the dictionary).
Cost: one covariance of d_model².
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from featureflow.sites import Site
from pipeline.describe.columns import PAD
from pipeline.describe.features import Features
from sae import Sae


def export_embedding_atlas(features: Features, saes: Mapping[Site, Sae], out: Path) -> Path:
    """Write one row a feature of every site in `saes`."""
    sites = [site for site in features.sites if site in saes]
    directions = torch.cat(
        [torch.nn.functional.normalize(saes[site].W_dec.float(), dim=1) for site in sites]
    ).numpy()
    frame = features.table[features.table["site"].isin([s.short for s in sites])]
    xy = _principal_plane(directions)
    columns = ("feature", "site", "layer", "density", "max", "label_accepted", "class", "community")
    table = pa.table(
        {
            "id": np.arange(len(frame)),
            "x": xy[:, 0],
            "y": xy[:, 1],
            "text": frame["label"],
            "neighbors": pa.array(_neighbours(features, sites)),
            **{name: frame[name] for name in columns},
        }
    )
    pq.write_table(table, out, compression="zstd")
    return out


def _principal_plane(directions: np.ndarray) -> np.ndarray:
    centred = directions.astype(np.float64) - directions.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    plane = vectors[:, :-3:-1]
    return (centred @ (plane * np.sign(plane.sum(axis=0) + 1e-12))).astype(np.float32)


def _neighbours(features: Features, sites: list[Site]) -> list[dict[str, Any]]:
    rows, start = [], 0
    for site in sites:
        columns = features.columns(site.short)
        for ids, cosine in zip(columns["similar"], columns["similar_cosine"], strict=True):
            near = ids != PAD
            rows.append({"ids": start + ids[near].astype(np.int64), "distances": 1 - cosine[near]})
        start += len(columns["count"])
    return rows
