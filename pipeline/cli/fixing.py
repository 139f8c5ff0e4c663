"""The command that fixes, as this user has to type it.

An error raised deep inside says `featureflow train`; the user ran `featureflow atlas -r mine.toml
--artifacts /data --train.n_latents 4096`. The same recipe, folder and fields of the stages up to
the one named belong to the command that fixes, or it fixes another run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

import click

from pipeline.cli.options import parse_overrides, split_overrides
from pipeline.stages import STAGES

_TOOLS = "plan|contrast|calibrate|generate|judge|export|paper|serve|explain|diff|validate|find|read"
_COMMAND = re.compile(
    rf"featureflow (?P<name>run|{'|'.join(STAGES)})\b(?P<kept>(?: --to \w+| --force)*)(?: --recipe "
    r"[^\s,;:]+)?"
    rf"(?P<more>(?: --to \w+| --force)*)(?! (?:--help|{_TOOLS})\b)"
)
_SHARED = (("--recipe", "-r"), ("--artifacts", None), ("--name", None))


def completed(fix: str, arguments: Sequence[str]) -> str:
    """`fix` with what `arguments`, the words of the command that failed, say of recipe, folder and
    fields."""
    overrides, rest = split_overrides(arguments)
    shared = [*_shared(rest)]

    def complete(match: re.Match[str]) -> str:
        flags = match["kept"] + match["more"]
        last = match["name"] if match["name"] in STAGES else re.sub(r".*--to (\w+).*", r"\1", flags)
        words = [*shared, *_fields(overrides, last if last in STAGES else STAGES[-1])]
        return shlex.join(["featureflow", match["name"], *words]) + flags

    return _COMMAND.sub(complete, fix)


def _shared(words: Sequence[str]) -> Iterator[str]:
    """`--recipe X` and `--artifacts Y`, in every spelling that the command line takes."""
    for long, short in _SHARED:
        for i, word in enumerate(words):
            name, equals, value = word.partition("=")
            if name == long and equals:
                yield from (long, value)
            elif word in (long, short) and i + 1 < len(words):
                yield from (long, words[i + 1])
            elif short and word.startswith(short) and word != short and not word.startswith("--"):
                yield from (long, word[len(short) :])


def _fields(overrides: Sequence[str], last: str) -> Iterator[str]:
    """The fields of the stages up to `last`."""
    try:
        fields = parse_overrides(overrides)
    except click.UsageError:
        return
    for name, value in fields.items():
        stage = name.partition(".")[0]
        if stage in STAGES and STAGES.index(stage) <= STAGES.index(last):
            yield from (f"--{name}", value)
