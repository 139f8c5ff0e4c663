"""The one error a user is meant to read: what is wrong, where, what was expected, what was found,
and what fixes it.

Every package raises it (or a subclass) for bad input; the command line prints it without a
traceback. All problems of one input are reported together, never one at a time.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. Only `what` is required; the others are printed when they are
    known."""

    what: str
    where: str | None = None
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        lines = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.expected is not None:
            lines.append(f"    expected: {self.expected}")
        if self.found is not None:
            lines.append(f"    found:    {self.found}")
        return "\n".join(lines)


@dataclass(frozen=True, init=False)
class Command:
    """A command of `featureflow` that puts something right: `Command("run", to="train")`. The
    command line prints it with the user's own recipe, folder and fields."""

    words: tuple[str, ...]
    to: str | None
    force: bool
    note: str

    def __init__(
        self, *words: str, to: str | None = None, force: bool = False, note: str = ""
    ) -> None:
        for name, value in (("words", words), ("to", to), ("force", force), ("note", note)):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return self.line()

    def line(self, given: Sequence[str] = ()) -> str:
        """As it is typed, with the `given` options."""
        flags = [*(["--to", self.to] if self.to else []), *(["--force"] if self.force else [])]
        line = shlex.join(["featureflow", *self.words, *given, *flags])
        return f"{line}: {self.note}" if self.note else line


Fix = str | Command | tuple[str | Command, ...]
"""What puts it right: an action in words, a command, or several, one after the other."""


class UserError(Exception):
    """Bad input or a bad state of the disk, explained, with the `fix` that puts it right."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: Fix | None = None,
        problems: tuple[Problem, ...] = (),
    ) -> None:
        self.problems = problems or (
            Problem(what=what, where=where, expected=expected, found=found),
        )
        self.what = what
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        head = [self.what] if len(self.problems) > 1 or self.problems[0].what != self.what else []
        lines = head + [str(problem) for problem in self.problems]
        if self.fix is not None:
            steps = self.fix if isinstance(self.fix, tuple) else (self.fix,)
            lines.append(f"    to fix:   {', then '.join(map(str, steps))}")
        return "\n".join(lines)
