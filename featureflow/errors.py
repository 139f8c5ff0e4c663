"""The one error a user is meant to read: what is wrong, where, what was expected, what was found,
and what fixes it.

Every package raises it (or a subclass) for bad input; the command line prints it without a
traceback. All problems of one input are reported together, never one at a time.
"""

from __future__ import annotations

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


class UserError(Exception):
    """Bad input or a bad state of the disk, explained; `fix` is a command or an action that puts
    it right."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
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
            lines.append(f"    to fix:   {self.fix}")
        return "\n".join(lines)
