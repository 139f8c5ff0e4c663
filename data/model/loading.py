"""Shared by the readers of models with transformers: quiet, and certainty that all weights came."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging

from featureflow.errors import Problem, UserError

_MOST = 24
_IN_BLOCK = re.compile(r"(^|\.)(layers|h|blocks?)\.\d+\.")
_BESIDE = re.compile(
    r"(inv_freq|masked_bias|attn\.bias|attention\.bias)$|vision|visual|audio|mtp\."
)
"""Masks and frequencies that older files hold, and what is not of the language model."""


def check_complete(source: Path, loading: Mapping[str, Any]) -> None:
    """The loader fills tensors that are missing or of another shape at random, leaves out those of
    a block that the configuration does not have (biases, norms, layers), and goes on; here that is
    an error."""
    problems = [
        Problem(what="tensor missing", where=name)
        for name in sorted(loading.get("missing_keys", ()))
    ]
    problems += [
        Problem(
            what="tensor of another shape",
            where=name,
            expected=str(tuple(wanted)),
            found=str(tuple(found)),
        )
        for name, found, wanted in sorted(loading.get("mismatched_keys", ()))
    ]
    problems += [
        Problem(what="the configuration has no place for this tensor", where=name)
        for name in sorted(loading.get("unexpected_keys", ()))
        if _IN_BLOCK.search(name) and not _BESIDE.search(name)
    ]
    if problems:
        shown = problems[:_MOST]
        if len(problems) > len(shown):
            shown.append(Problem(what=f"and {len(problems) - len(shown)} more"))
        raise UserError(
            f"the weights in {source} are not those of its configuration", problems=tuple(shown)
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no notices from the libraries; what they said before is restored."""
    verbosity, hub_was_quiet = logging.get_verbosity(), are_progress_bars_disabled()
    was_active = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_active:
            logging.enable_progress_bar()
        if not hub_was_quiet:
            enable_progress_bars()
