"""The activation store: rows of activations at named sites in a Zarr v3 group that cannot be read
wrong."""

from data.store.layout import SiteLayout, StoreLayout
from data.store.modules import store_modules
from data.store.statistics import SiteStatistics
from data.store.store import ActivationStore
from data.store.writer import StoreWriter, write_activations
from data.tokens import (
    FLAG_BOS,
    FLAG_NON_FINITE,
    FLAG_PADDING,
    FLAG_SINK,
    FLAG_SPECIAL,
    DocumentRow,
    RowFilters,
    TokenTable,
)

__all__ = [
    "FLAG_BOS",
    "FLAG_NON_FINITE",
    "FLAG_PADDING",
    "FLAG_SINK",
    "FLAG_SPECIAL",
    "ActivationStore",
    "DocumentRow",
    "RowFilters",
    "SiteLayout",
    "SiteStatistics",
    "StoreLayout",
    "StoreWriter",
    "TokenTable",
    "store_modules",
    "write_activations",
]
