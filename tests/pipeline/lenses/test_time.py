"""What lies ahead of a token and behind it, by slow loops and planted texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from data.tokens import FLAG_BOS
from featureflow.sites import parse_site
from pipeline.lenses import time
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.read_out import Vocabulary, later
from pipeline.lenses.translators import fit
from pipeline.run import Run


def test_later_rows_are_in_the_same_context_and_document(run: Run) -> None:
    tokens, rows = run.tokens, np.arange(200)
    for n in (-2, 0, 1, 3):
        found = later(run, rows, n)
        for row in rows:
            to = row + n
            inside = to >= 0 and to // run.store.n_context == row // run.store.n_context
            known = (
                inside
                and tokens.document[to] == tokens.document[row]
                and not tokens.flags[to] & FLAG_BOS
            )
            assert found[row] == (to if known else -1)


def test_the_commonest_token_after_a_gap() -> None:
    before, after = np.array([1, 1, 1, 2, 2]), np.array([5, 6, 6, 9, 8])
    assert time.commonest(before, after) == {1: 6, 2: 8}


def test_one_pass_fits_every_target_as_one_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 5, generator=generator) + 40
    B = torch.randn(5, 3, generator=generator)
    y, z = x @ B - 2, -(x @ B)
    (A, b), (A2, _) = fit(*((lambda v=v: iter(v.split(400))) for v in (x, y, z)))
    torch.testing.assert_close(x.double() @ A + b, y.double(), atol=0.05, rtol=0)
    torch.testing.assert_close(A, -A2, atol=1e-3, rtol=0)


def test_the_embedding_keeps_its_token_and_not_the_one_before(run: Run) -> None:
    config = time.Config(n_tokens=2000, n_rows=300, n_tested=400, n_layers=1, back=(0, 2))
    table = time.look(run, config).tables["layers"]
    past = table[(table["what"] == "past") & (table["from"] == "embedding")].set_index("n")
    assert past.loc[0, "precision"] > 0.95
    assert past.loc[-2, "precision"] < 0.2
    future = table[table["what"] == "future"].set_index(["from", "n"])["precision"]
    assert future["L2", 0] > future["embedding", 0] > future["bigram", 0]


def test_lifts_are_those_of_a_plain_count(run: Run) -> None:
    """A map that carries a latent's row to the direction of one frequent token."""
    site, ids = parse_site("L1"), run.tokens.id
    config = time.Config(n_tested=1500)
    sae, store = run.saes[site], run.store
    rows = store.kept_rows("validation")
    active = (sae.encode(torch.from_numpy(store.read(site, 0, store.n_rows)[rows])) > 0).numpy()
    latent = int(active.sum(0).argmax())
    values, counts = np.unique(ids, return_counts=True)
    frequent = int(values[counts.argmax()])
    W_U, gain = run.model.unembedding()
    A = torch.outer(sae.W_dec[latent].detach(), (W_U - W_U.mean(0))[frequent] * gain).double()
    table = time.announcing(run, site, {1: (A, torch.zeros(run.model.d_model))}, config)
    [row] = table[table["feature"] == f"L1/{latent}"].to_dict("records")
    words = row["tokens"].split(" ")
    text = run.model.tokenizer.token_text
    assert text(frequent).strip() in words
    assert row["at"] == 2
    chosen = np.concatenate(choose_rows(run, Sampled(), 1500))
    there = later(run, chosen, 2)
    known = there >= 0
    ten = Vocabulary(run).promoted(sae.W_dec[latent : latent + 1].detach() @ A.float())[0]
    comes = np.array([i in ten for i in ids[there]])[known]
    here = active[np.isin(rows, chosen), latent][known]
    assert row["own_lift"] == pytest.approx(comes[here].mean() / comes.mean(), rel=1e-6)


def test_cards_show_the_step_with_the_largest_lift() -> None:
    features = pd.DataFrame(
        {
            "feature": ["L1/0", "L1/0", "L1/0", "L1/1"],
            "at": [1, 2, 3, 2],
            "own_lift": [9.0, 2.0, 3.0, 5.0],
            "own_q": [0.0, 0.01, 0.01, 0.6],
            "tokens": ["a", "b", "c", "d"],
        }
    )
    found = time._columns(features, 0.05)
    assert found is not None
    assert found.to_dict("records") == [
        {"feature": "L1/0", "announces": "t+3: c", "announces_lift": pytest.approx(3.0)}
    ]
