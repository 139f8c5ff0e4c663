"""Shared by the readers of models with transformers: quiet, and certainty that all weights came."""

from __future__ import annotations

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


def check_complete(source: Path, loading: Mapping[str, Any]) -> None:
    """The loader fills tensors that are missing or of another shape at random and goes on; here
    that is an error."""
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
    if problems:
        raise UserError(f"the weights in {source} are incomplete", problems=tuple(problems))


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
