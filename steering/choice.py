"""The base of every small dataclass that a plan file may hold: keys it does not know are refused when it is read."""

from __future__ import annotations

from typing import Any, ClassVar


class FromFile:
    """Read from a file by pydantic; an unknown key is an error, not a silent default."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
