"""Short texts through the model, in batches of equal length: nothing is padded.

`iter_texts` gives, for each batch, the places of its texts, their ids (with the start token) and
the activations at the wanted sites. Cost: one forward pass over all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.sites import Site
from pipeline.run import Run

_BATCH = 32
Activations = dict[Site, Float[Tensor, "text position d_model"]]


def iter_texts(
    run: Run, texts: Sequence[str], sites: Sequence[Site], *, label: str = "read texts"
) -> Iterator[tuple[list[int], Int[Tensor, "text position"], Activations]]:
    """Batches of texts of one length, float32, on the CPU."""
    tokenizer = run.model.tokenizer
    most = run.model.n_context
    coded = [[tokenizer.bos_id, *tokenizer.encode(text)][:most] for text in texts]
    order = sorted(range(len(coded)), key=lambda place: len(coded[place]))
    done = 0
    while done < len(order):
        run.context.progress(label, done, len(order))
        length = len(coded[order[done]])
        places = [p for p in order[done : done + _BATCH] if len(coded[p]) == length]
        ids = torch.tensor([coded[place] for place in places])
        found = run.model.activations(ids, sites)
        yield places, ids, {site: value.float().cpu() for site, value in found.items()}
        done += len(places)
    run.context.progress(label, len(order), len(order))


def last_tokens(
    run: Run, texts: Sequence[str], sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "text d_model"]]:
    """The activation of every text's last token."""
    last = {site: torch.zeros(len(texts), run.model.d_model) for site in sites}
    for places, _, found in iter_texts(run, texts, sites):
        for site, x in found.items():
            last[site][places] = x[:, -1]
    return last
