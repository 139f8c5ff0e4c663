"""Labels written by a language model behind an OpenAI-compatible address; off unless an address is
given.

1. *explain*: examples with the activating tokens between << >>; the answer must be one short line,
   or it is refused (scratch text does not become a label);
2. *detect*: held-out windows, those with the feature mixed with silent ones and near-misses, five
   at a time; the model says 1 or 0 for each, and the balanced accuracy is the label's score, with
   Wilson's interval over windows;
3. *fuzz*: windows with the feature, marked where it is active or on other tokens instead; the model
   says whether the marks fit the label, scored alike.

An answer is read after the model's reasoning. One that is no list of as many numbers, or that
holds two different lists, is unreadable: its windows count as asked, not as answered.

Nothing is sent anywhere but to the address given (pipeline/describe/chat.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.describe.chat import ChatModel, after_reasoning
from pipeline.describe.rules import wilson

ANSWER_TOKENS = 64
_LONGEST = 160
_PER_QUESTION = 5
_EXPLAIN = (
    "Below are excerpts from text. In each, the tokens on which one feature of a language model is "
    "active stand "
    "between << and >>. Answer with one short phrase, at most fifteen words, saying what those "
    "tokens have in common. "
    "Answer with the phrase alone.\n\n{examples}"
)
_DETECT = (
    "A feature of a language model is described as: {label}\nFor each excerpt below, answer 1 if "
    "the feature is active "
    "somewhere in it and 0 if not. Answer with a JSON list of {n} numbers and nothing "
    "else.\n\n{examples}"
)
_FUZZ = (
    "A feature of a language model is described as: {label}\nIn each excerpt below tokens stand "
    "between << and >>. "
    "Answer 1 if the description fits the marked tokens and 0 if not. Answer with a JSON list of "
    "{n} numbers and "
    "nothing else.\n\n{examples}"
)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well a label tells true windows from others: balanced accuracy and its interval over the
    `n` windows that were answered readably, of `n_asked`. No score where no window of one kind
    was."""

    score: float | None = None
    low: float | None = None
    high: float | None = None
    n: int
    n_asked: int


def explain(
    chat: ChatModel, examples: Sequence[str], *, max_tokens: int = ANSWER_TOKENS
) -> str | None:
    """A label for marked examples; None when the answer is no short single line."""
    question = _EXPLAIN.format(examples=_numbered(examples))
    answer = after_reasoning(chat.ask(question, max_tokens=max_tokens))
    answer = (
        re.sub(r"^(label|answer|explanation)\s*:\s*", "", answer, flags=re.IGNORECASE)
        .strip()
        .strip("\"'")
    )
    sound = 0 < len(answer) <= _LONGEST and "\n" not in answer and "<<" not in answer
    return answer if sound else None


def detect(
    chat: ChatModel,
    label: str,
    active: Sequence[str],
    other: Sequence[str],
    *,
    max_tokens: int = ANSWER_TOKENS,
) -> Detection:
    """How well the label tells windows with the feature from windows without."""
    return _judged(chat, _DETECT, label, active, other, max_tokens)


def fuzz(
    chat: ChatModel,
    label: str,
    right: Sequence[str],
    wrong: Sequence[str],
    *,
    max_tokens: int = ANSWER_TOKENS,
) -> Detection:
    """How well the label tells windows marked where the feature is active from windows marked
    elsewhere."""
    return _judged(chat, _FUZZ, label, right, wrong, max_tokens)


def _judged(
    chat: ChatModel,
    template: str,
    label: str,
    true: Sequence[str],
    false: Sequence[str],
    max_tokens: int,
) -> Detection:
    windows = [(text, True) for text in true] + [(text, False) for text in false]
    order = np.random.default_rng(0).permutation(len(windows))
    hits = {True: 0, False: 0}
    n = {True: 0, False: 0}
    for start in range(0, len(order), _PER_QUESTION):
        block = [windows[i] for i in order[start : start + _PER_QUESTION]]
        question = template.format(
            label=label, n=len(block), examples=_numbered([text for text, _ in block])
        )
        said_of_block = _bits(chat.ask(question, max_tokens=max_tokens), len(block))
        for said, (_, is_active) in zip(said_of_block, block, strict=False):
            n[is_active] += 1
            hits[is_active] += said == is_active
    total = n[True] + n[False]
    if not n[True] or not n[False]:
        return Detection(n=total, n_asked=len(windows))
    balanced = (hits[True] / n[True] + hits[False] / n[False]) / 2
    low, high = (
        round(float(bound[0]), 4)
        for bound in wilson(np.array([balanced * total]), np.array([float(total)]))
    )
    return Detection(score=round(balanced, 4), low=low, high=high, n=total, n_asked=len(windows))


def marked(pieces: Sequence[str], values: Sequence[float]) -> str:
    """A window with its active tokens between << >>."""
    return "".join(
        f"<<{piece}>>" if value > 0 else piece for piece, value in zip(pieces, values, strict=True)
    )


def _bits(answer: str, n: int) -> list[bool]:
    """The list of 0 and 1 in an answer; nothing when it has another length, or when the answer has
    two different lists."""
    lists = {
        tuple(found[1].replace(",", " ").split())
        for found in re.finditer(r"\[([\d.,\s]*)\]", after_reasoning(answer))
    }
    bits = lists.pop() if len(lists) == 1 else ()
    return [bit == "1" for bit in bits] if len(bits) == n and set(bits) <= {"0", "1"} else []


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))
