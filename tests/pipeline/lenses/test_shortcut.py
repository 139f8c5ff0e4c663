"""Maps to the last layer and what is read through them, on planted activations: a linear network
is carried exactly, what is not linear is not; a feature's carried tokens are those of its image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.lenses import shortcut, translators
from pipeline.lenses.base import run_lens
from pipeline.lenses.parts.read_out import followed, iter_log_p
from pipeline.run import Run

D = 6


def test_a_linear_step_is_carried_exactly_and_another_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    h0 = torch.randn(3000, D, generator=generator)
    B = torch.randn(D, D, generator=generator)
    h1 = h0.abs() + 1
    h2 = h1 @ B + 3
    [(A, offset)] = translators.fit(lambda: iter(h1.split(700)), lambda: iter(h2.split(700)))
    torch.testing.assert_close((h1.double() @ A + offset), h2.double(), atol=2e-3, rtol=1e-3)
    [(A, offset)] = translators.fit(lambda: iter([h0]), lambda: iter([h2]))
    error = (h0.double() @ A + offset - h2).square().sum() / (h2 - h2.mean(0)).square().sum()
    assert float(error) > 0.9, "|x| has no linear part in x"


@pytest.fixture(scope="module")
def carried(run: Run) -> Run:
    run_lens("translators", run, translators.Config(n_tokens=3000, n_held_out=600))
    return run


def test_maps_are_judged_on_rows_they_were_not_fitted_on(carried: Run) -> None:
    finding = carried.lens("translators")
    table = finding.tables["maps"].set_index("from")
    assert list(table.index) == ["embedding", "L0", "L1", "L2"]
    assert (table["r2_low"] <= table["r2"]).all()
    assert (table["r2"] <= table["r2_high"]).all()
    assert (table["r2"] > table["null"] + 0.2).all()
    assert (table["null"].abs() < 0.2).all()
    assert table["r2"].is_monotonic_increasing, "layer by layer nearer to the end"
    store, site, last = carried.store, parse_site("L1"), parse_site("L3")
    rows = store.kept_rows("validation")[:600]
    x, y = (torch.from_numpy(store.read(s, 0, store.n_rows)[rows]) for s in (site, last))
    guess = x @ torch.from_numpy(finding.arrays["L1"]) + torch.from_numpy(
        finding.arrays["L1.offset"]
    )
    plain = 1 - float((guess - y).square().sum() / (y - y.mean(0)).square().sum())
    assert plain == pytest.approx(table.loc["L1", "r2"], abs=0.05)


def test_read_outs_are_the_models_own(carried: Run) -> None:
    """From the last layer the model's distribution; from another, by a plain loop over rows."""
    store, model = carried.store, carried.model
    first = -(-store.validation_start // store.n_context) * store.n_context
    ids = torch.from_numpy(store.tokens().id[first : first + store.n_context].astype(np.int64))
    seen = model.activations(ids[None], (parse_site("L3"),))[parse_site("L3")][0]
    [log_p] = [*iter_log_p(carried, seen)]
    torch.testing.assert_close(log_p, model.logits(ids[None])[0].log_softmax(-1), atol=1e-4, rtol=0)


def test_layers_exits_and_features_of_the_tiny_run(carried: Run) -> None:
    config = shortcut.Config(n_rows=300, n_tokens=600)
    finding = shortcut.look(carried, config)
    layers = finding.tables["layers"].set_index(["site", "read"])
    assert (layers["precision_1"] <= layers["precision_10"]).all()
    gain = layers.xs("carried", level="read")["surprisal"]
    own = layers.xs("as it is", level="read")["surprisal"]
    assert (gain[["L0", "L1"]] < own[["L0", "L1"]]).all()
    [row] = finding.tables["exit"].to_dict("records")
    assert 0 <= row["layers_saved"] < 1
    assert row["agreement"] > 0.5
    features = finding.tables["features"]
    assert finding.columns is not None
    assert list(finding.columns) == ["feature", "promotes by the end"]
    assert features["feature"].tolist() == finding.columns["feature"].tolist()
    assert len(features) == sum(carried.saes[parse_site(s)].n_latents for s in ("L0", "L1", "L2"))


def test_carried_tokens_are_those_of_the_image(carried: Run) -> None:
    """Carried by a rotation, a feature promotes what the rotated row promotes directly."""
    site = parse_site("L1")
    d = carried.saes[site].W_dec.detach().float()
    generator = torch.Generator().manual_seed(1)
    rotation, _ = torch.linalg.qr(torch.randn(d.shape[1], d.shape[1], generator=generator))
    config = shortcut.Config(n_tokens=300)
    table = shortcut.of_features(carried, site, rotation.numpy(), config)
    W_U, gain = carried.model.unembedding()
    u = W_U * gain
    seen = np.unique(carried.tokens.id)
    scores = (d @ rotation @ (u - u.mean(0)).T)[:, torch.from_numpy(seen.astype(np.int64))]
    for latent in range(0, 64, 9):
        best = seen[scores[latent].topk(10).indices.numpy()]
        words = [carried.model.tokenizer.token_text(int(token)).strip() for token in best]
        assert table["carried"][latent] == " ".join(words)


def test_a_feature_that_announces_a_token_is_found_and_others_are_not() -> None:
    rng = np.random.default_rng(0)
    next_id = rng.integers(0, 100, 4000)
    active = rng.random((4000, 3)) < 0.05
    active[:, 0] = next_id == 7
    ten = np.stack([np.arange(7, 17), np.arange(50, 60), np.arange(80, 90)])
    found = followed(ten, active, next_id, name="carried")
    assert found["carried_lift"][0] == pytest.approx(1 / np.isin(next_id, ten[0]).mean())
    assert found["carried_q"][0] < 1e-6
    assert (found["carried_q"][1:] > 0.05).all()


def test_a_store_without_the_last_layer_is_refused(
    carried: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deeper:
        n_layers = 9

    monkeypatch.setitem(carried.__dict__, "model", Deeper())
    with pytest.raises(UserError, match="the last layer is not stored") as caught:
        shortcut.look(carried, shortcut.Config())
    assert "resid_post:8" in str(caught.value)


def test_the_exit_threshold_is_chosen_on_other_documents_than_it_is_judged_on() -> None:
    """Two layers of which the first is right where its lead is large."""
    truth, document = np.zeros(60, dtype=int), np.repeat(np.arange(6), 10)
    gap = np.tile(np.linspace(0, 0.9, 10), 6)[None]
    first = np.where(gap > 0.45, 0, 1)
    config = shortcut.Config(agreement=0.99)
    [row] = shortcut._early_exit(first, gap, truth, document, [0, 1], config).to_dict("records")
    assert row["agreement"] == 1.0
    assert row["layers_saved"] == pytest.approx(0.5 * 0.5)
    assert row["n_rows"] == 40
