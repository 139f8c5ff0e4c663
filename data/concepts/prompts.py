"""Prompts and neutral texts written for this project: what steering is measured on.

Neutral openers begin a text about nothing in particular; `dev` ones may be used to choose, `test`
ones only to report. Neutral texts are the scale on which doses are measured. Topical openers begin
a text about one topic, for suppression: `topical` to choose, `topical_test` to report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    topical_test: Mapping[str, tuple[str, ...]]


@cache
def read_prompts() -> Prompts:
    """The bundled prompts."""
    document: dict[str, Any] = json.loads(
        files("data.concepts").joinpath("prompts.json").read_text(encoding="utf-8")
    )
    return Prompts(
        dev=tuple(document["neutral_openers"]["dev"]),
        test=tuple(document["neutral_openers"]["test"]),
        neutral_texts=tuple(document["neutral_texts"]),
        topical=_by_topic(document["topical_openers"]["dev"]),
        topical_test=_by_topic(document["topical_openers"]["test"]),
    )


def _by_topic(lines: Mapping[str, Sequence[str]]) -> Mapping[str, tuple[str, ...]]:
    return MappingProxyType({topic: tuple(own) for topic, own in lines.items()})
