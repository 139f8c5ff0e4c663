"""Which held-out tokens an experiment of `featureflow paper` looks at: contexts for targets, other
rows for firing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from featureflow.errors import UserError

if TYPE_CHECKING:
    from data.model.language_model import LanguageModel
    from data.store import ActivationStore
    from pipeline.flow.causal import Contexts
    from pipeline.lenses.paper.subject import Effort


def contexts_of(store: ActivationStore) -> Callable[[LanguageModel, int], Contexts]:
    """The first held-out contexts, at most half of them: targets and losses come from there."""
    from pipeline.flow.validation import held_out_contexts

    return lambda model, n: held_out_contexts(
        model, store, n_contexts=min(n, _most_contexts(store))
    )


def rows_after_contexts(store: ActivationStore, effort: Effort) -> Any:
    """Held-out rows after those contexts, so that what is fitted on them is tested on others.
    Raises UserError."""
    first = -(-store.validation_start // store.n_context) + min(
        effort.n_contexts, _most_contexts(store)
    )
    kept = store.kept_rows("validation")
    rows = kept[kept >= first * store.n_context][: effort.n_tokens]
    if not len(rows):
        raise UserError(
            "the store has too few held-out tokens",
            where=store.url,
            expected=f"more than {first * store.n_context - store.validation_start} held-out rows",
            fix="raise collect.validation_fraction or collect.n_tokens",
        )
    return rows


def _most_contexts(store: ActivationStore) -> int:
    return max(1, (store.n_rows - store.validation_start) // store.n_context // 2)
