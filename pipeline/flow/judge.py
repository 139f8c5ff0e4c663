"""Cosines, nulls and activity of a pair of dictionaries → one p-value and one q-value per edge.

1. Is anything there? The p-value of a link is the largest of

    p_cosine      the cosine beats the null of decoder rows (siblings.py: what the target would
                  reach without its partner)
    p_active      the two are active together more than a source of the same density would be
    p_beyond      only for dictionaries of one start, which may be alike because neither moved:
                  the cosine beats what inertia leaves, or the link correlates more than any rival
                  source does: 2 · min(p_inertia, p_rival), at most 1 (Bonferroni)

The second half of p_beyond is what remains when training was so short that inertia explains every
cosine. Without held-out activations p_active and p_rival are missing; `link` then says so.
`related` is Benjamini and Hochberg's q of it over the best link of each target.

2. Is it this source? `p_partner` is a link's place among the rivals of the targets that step 1
   accepts at the rate with a first choice both ways: what is left when the partner is taken away
   (partner.py).

A link is kept at a rate in one of two ways; its q-value is the smallest rate at which it is:

- by the larger of `related` and of the q of p_partner among the targets that step 1 accepts;
- with tokens: by twice the q of its place by reading and activity, among *all* targets of the pair
  (twice, for it is a second way). Such links are so much stronger than what stands in for a partner
  that they need no null of directions; in small dictionaries, whose rows are sums of each other,
  that null sees nothing. Without tokens this way does not keep its rate in clusters. Dictionaries
  of one start do not have it.

Presence is claimed by q, absence (a newborn feature) only where even `related` fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from featureflow.statistics import p_values, q_values
from pipeline.flow.edges import EdgeColumns
from pipeline.flow.functional import Cofiring
from pipeline.flow.null import NullSample


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """p-values of the edges of one pair. `cosine`: the largest over all decoder nulls; `active` and
    `rival`: None without held-out activations; `joint` is what the first step judges, `related`
    its false-discovery rate, `q` the smallest rate at which the link is kept."""

    cosine: Float[np.ndarray, "edge"]
    active: Float[np.ndarray, "edge"] | None
    rival: Float[np.ndarray, "edge"] | None
    partner: Float[np.ndarray, "edge"]
    joint: Float[np.ndarray, "edge"]
    q: Float[np.ndarray, "edge"]
    related: Float[np.ndarray, "edge"]


def judge(
    columns: EdgeColumns,
    nulls: Sequence[NullSample],
    cofiring: Cofiring | None,
    few: Bool[np.ndarray, "target"] | None,
    *,
    stand_ins: Sequence[tuple[Float[np.ndarray, "edge"], Float[np.ndarray, "target"]]],
    fdr: float,
    same_start: bool,
) -> Evidence:
    """`few` marks targets that were active too seldom for their rivals to say anything. No nulls:
    nothing is significant. `stand_ins` are those of partner.py; `fdr` is the rate at which step 1
    accepts."""
    ones = np.ones(len(columns.source))
    if not nulls:
        return Evidence(
            cosine=ones, active=None, rival=None, partner=ones, joint=ones, q=ones, related=ones
        )
    chance = _largest(columns, [null for null in nulls if not null.of_start])
    inertia = _largest(columns, [null for null in nulls if null.of_start])
    cosine = np.max([p for p in (chance, inertia) if p is not None], axis=0)
    active = rival = None
    if cofiring is not None and few is not None:
        active = p_values(cofiring.links.pearson, cofiring.chance.pearson)
        rival = _beyond_rivals(columns, cofiring, few)
    evidence = [cosine, active]
    if same_start and rival is not None:
        beyond = rival if inertia is None else np.minimum(1.0, 2 * np.minimum(inertia, rival))
        evidence = [chance, active, beyond]
    joint = np.max([p for p in evidence if p is not None], axis=0)
    related = q_values(joint, joint[columns.top])
    asked = columns.top & (related <= fdr)
    clear = asked & columns.mutual  # siblings of clear targets are the strongest stand-ins
    enough = clear.sum() + 1 >= 1 / fdr
    known = columns.target[clear if enough else asked]
    partner, *with_tokens = [p_values(shared, rival[known]) for shared, rival in stand_ins]
    q = np.maximum(related, q_values(partner, partner[asked]))
    for p in () if same_start else with_tokens:
        q = np.minimum(q, 2 * q_values(p, p[columns.top]))
    return Evidence(
        cosine=cosine,
        active=active,
        rival=rival,
        partner=partner,
        joint=joint,
        q=q,
        related=related,
    )


def _largest(columns: EdgeColumns, nulls: Sequence[NullSample]) -> Float[np.ndarray, "edge"] | None:
    found = [null.p_values(columns.cosine, columns.target) for null in nulls]
    return np.max(found, axis=0) if found else None


def _beyond_rivals(
    columns: EdgeColumns, cofiring: Cofiring, few: Bool[np.ndarray, "target"]
) -> Float[np.ndarray, "edge"]:
    """How often the best source other than the linked one correlates as well, over the targets of
    the pair."""
    known = columns.top & ~few[columns.target]
    rivals = cofiring.best.rival(columns.source[known], columns.target[known])
    return p_values(cofiring.links.pearson, rivals)
