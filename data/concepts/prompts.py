"""Prompts and neutral texts written for this project: what steering is measured on.

Neutral openers begin a text about nothing in particular; `dev` ones may be used to choose, `test` ones only to report.
Neutral texts are the scale on which doses are measured. Topical openers begin a text about one topic, for suppression.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Prompts:
    dev: tuple[str, ...]
    test: tuple[str, ...]
    neutral_texts: tuple[str, ...]
    topical: Mapping[str, tuple[str, ...]]


@cache
def read_prompts() -> Prompts:
    """The bundled prompts."""
    document: dict[str, Any] = json.loads(files("data.concepts").joinpath("prompts.json").read_text(encoding="utf-8"))
    return Prompts(
        dev=tuple(document["neutral_openers"]["dev"]),
        test=tuple(document["neutral_openers"]["test"]),
        neutral_texts=tuple(document["neutral_texts"]),
        topical=MappingProxyType({topic: tuple(lines) for topic, lines in document["topical_openers"].items()}),
    )
