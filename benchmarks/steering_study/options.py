"""Sizes of a study, its arms, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.lenses.steering.topic_samples import SampleSizes

UNSTEERED, PROMPTED, WHOLE_BUDGET = "unsteered", "prompt", "single_budget"
ACTIVATION_ARMS = (
    "difference_single",
    "difference_flow",
    "random_direction",
    "random_flow",
    "single",
    "copied",
    "flow",
    "flow_exponential",
    "flow_cosines",
    "flow_closed_loop",
)
SUPPRESSION_ARMS = ("suppress_single", "suppress_flow", "suppress_random_flow")
ARMS = (*ACTIVATION_ARMS, *SUPPRESSION_ARMS)
N_NEUTRAL_TEXTS, N_NEUTRAL_TOKENS = 12, 32


@dataclass(frozen=True, kw_only=True)
class StudyOptions(SampleSizes):
    """Sizes of a study. A claim needs twelve topics; four show that it runs."""

    topics: tuple[str, ...]
    doses: tuple[float, ...] = (0.03, 0.08, 0.2, 0.5)
    min_coherent: float = 0.8
    dose_tolerance: float = 0.1


def cost_of(options: StudyOptions) -> dict[str, int]:
    """Tokens that a study generates and scores, roughly: for an estimate of its time before it
    starts."""
    n_doses, n_topics = len(options.doses), len(options.topics)
    dev = n_doses * options.n_dev_prompts * options.n_samples * options.n_tokens
    test = options.n_test_prompts * options.n_samples * options.n_tokens
    generated = n_topics * (len(ARMS) * (dev + test) + 4 * test)
    calibration = n_topics * len(ARMS) * (n_doses + 2) * N_NEUTRAL_TEXTS * N_NEUTRAL_TOKENS
    screening = n_topics * len(ARMS) * (n_doses + 1) * 2 * options.n_texts * 24
    return {"generated": generated, "scored": calibration + screening + 5 * generated // 4}
