"""A store and Dask: rows of a site as an array, one task a shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import dask.array

    from data.sites import Site
    from data.store.store import ActivationStore


def dask_array_of(store: ActivationStore, site: Site | str) -> dask.array.Array:
    """Float32 rows, one chunk a shard. Workers open the store by its URL and compare checksums."""
    import dask.array as da
    from dask import delayed

    width = store.width(site)
    parts = []
    for shard in range(store.layout.n_shards):
        start, stop = store.layout.rows_of_shard(shard)
        part = delayed(_read_part, pure=True)(store.url, str(site), start, stop)
        parts.append(da.from_delayed(part, shape=(stop - start, width), dtype=np.float32))
    return da.concatenate(parts) if parts else da.zeros((0, width), dtype=np.float32)


def _read_part(url: str, site: str, start: int, stop: int) -> np.ndarray:
    from data.store.store import ActivationStore

    return ActivationStore.open(url).read(site, start, stop)
