"""A language model as judge of steered text, at any address that speaks OpenAI's chat protocol. Off
unless asked for.

1. A rubric is a few questions, each asked in a call of its own at temperature 0, each answered by
   one whole number: AxBench's three (concept, relevance, fluency, 0 to 2; harmonic mean, 0 if any
   is 0) and SAE-TS's two (behaviour, coherence, 1 to 10; mapped to 0…1, their product). The wording
   is ours, the scales and totals are theirs.
2. An answer is read strictly, after the model's reasoning: one `Rating: [[n]]`, or a number with
   nothing but punctuation before it and no other number after it (`8/10` is 8). Two different
   numbers are no answer. A number with a colon or an equals sign after it is none either, nor one
   that begins a list: a small model recites the scale ("0: not at all. 1: …") or writes points ("1.
   The text is …"). What is unread is never guessed; it is counted
   and shown with the result.
3. A verdict has a total only if all its answers were read.

A small judge may answer in form without judging: `spread` says whether it gave different texts
different ratings. Cost: one short answer a question. Sources: AxBench (arXiv 2501.17148), SAE-TS
(arXiv 2411.02193).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featureflow.progress import Progress, silent
from pipeline.describe.chat import ChatModel, after_reasoning

_FORM = re.compile(r"\[\[([^\]]*)\]\]")
_BARE = re.compile(r"\W*?(?:rating\W*?)?(-?\d+)(?!\s*[:=]|[.)]\s+\S)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")

ANSWER_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Question:
    """One rating: what is asked, and what the ends of its scale mean."""

    name: str
    text: str
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """The questions that are asked of every text."""

    name: str
    questions: tuple[Question, ...]

    def total(self, ratings: Mapping[str, int]) -> float:
        """0 to 2 for AxBench, 0 to 1 for SAE-TS."""
        values = [ratings[question.name] for question in self.questions]
        if self.name == "axbench":
            return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)
        return math.prod(
            (value - question.low) / (question.high - question.low)
            for value, question in zip(values, self.questions, strict=True)
        )


AXBENCH = Rubric(
    name="axbench",
    questions=(
        Question(
            name="concept",
            text="How much is the text about the concept? 0: not at all. 1: in part. 2: clearly.",
            low=0,
            high=2,
        ),
        Question(
            name="relevance",
            text="How well does the text continue the opening? 0: it does not. 1: in part. 2: "
            "well.",
            low=0,
            high=2,
        ),
        Question(
            name="fluency",
            text="How well does the text read? 0: it is broken. 1: it has flaws. 2: it reads well.",
            low=0,
            high=2,
        ),
    ),
)
SAE_TS = Rubric(
    name="sae-ts",
    questions=(
        Question(
            name="behaviour",
            text="How strongly does the text show the concept, from 1 to 10?",
            low=1,
            high=10,
        ),
        Question(
            name="coherence",
            text="How coherent and sensible is the text, from 1 to 10?",
            low=1,
            high=10,
        ),
    ),
)
RUBRICS = {rubric.name: rubric for rubric in (AXBENCH, SAE_TS)}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A text to be judged: the opening it was written from, and what it should be about."""

    concept: str
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The ratings that could be read, the answers as they came, and the total (None if any was
    unread)."""

    ratings: Mapping[str, int]
    answers: Mapping[str, str]
    total: float | None


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Who is asked (pipeline/describe/chat.py), and how long an answer may be."""

    chat: ChatModel
    max_tokens: int = ANSWER_TOKENS

    def judge(
        self, rubric: Rubric, texts: Sequence[Judged], *, progress: Progress = silent
    ) -> list[Verdict]:
        """One verdict a text. Raises UserError when the address does not answer."""
        verdicts = []
        for done, each in enumerate(texts, 1):
            answers = {
                question.name: self.chat.ask(
                    question_text(question, each), max_tokens=self.max_tokens
                )
                for question in rubric.questions
            }
            verdicts.append(verdict_of(rubric, answers))
            progress("judge", done, len(texts))
        return verdicts


def question_text(question: Question, each: Judged) -> str:
    """What the judge is asked: the text between markers, the question, the form of the answer."""
    return (
        f"You rate short texts.\n\nConcept: {each.concept}\nOpening: {each.prompt}\n"
        f'Text: """{each.text.strip()}"""\n\n{question.text}\n'
        f"Answer with one whole number from {question.low} to {question.high}, in the form Rating: "
        "[[n]]."
    )


def read_rating(question: Question, answer: str) -> int | None:
    """The number of an answer; None if it has none, two different ones, or none of the scale."""
    said = re.sub(rf"(\d)\s*(?:/|out of)\s*{question.high}\b", r"\1", after_reasoning(answer))
    found = {each.strip() for each in _FORM.findall(said)}
    if not found and _BARE.match(said):
        found = set(_NUMBER.findall(said))
    if len(found) != 1 or not re.fullmatch(r"\d+", value := found.pop()):
        return None
    return int(value) if question.low <= int(value) <= question.high else None


def verdict_of(rubric: Rubric, answers: Mapping[str, str]) -> Verdict:
    """The answers of one text, read."""
    read = {
        question.name: read_rating(question, answers[question.name])
        for question in rubric.questions
    }
    ratings = {name: value for name, value in read.items() if value is not None}
    return Verdict(
        ratings=ratings,
        answers=dict(answers),
        total=rubric.total(ratings) if len(ratings) == len(read) else None,
    )


def readable_share(rubric: Rubric, verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Per question, and for `all` of them together, the share of texts whose answer could be
    read."""
    n = max(len(verdicts), 1)
    shares = {
        q.name: sum(q.name in verdict.ratings for verdict in verdicts) / n for q in rubric.questions
    }
    return {**shares, "all": sum(verdict.total is not None for verdict in verdicts) / n}


def spread(rubric: Rubric, verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Per question, how many different ratings were given. 1: the judge says the same of every
    text."""
    return {
        q.name: len({v.ratings[q.name] for v in verdicts if q.name in v.ratings})
        for q in rubric.questions
    }
