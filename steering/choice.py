"""The base of every small dataclass that a plan file may hold.

A subclass is a frozen dataclass with named arguments, and keys that it does not know are refused
when it is read. A choice among several (an edit, a scope, a schedule) is a union of subclasses told
apart by their `kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import dataclass_transform


@dataclass_transform(kw_only_default=True, frozen_default=True)
class FromFile:
    """Read from a file by pydantic; an unknown key is an error, not a silent default."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)
