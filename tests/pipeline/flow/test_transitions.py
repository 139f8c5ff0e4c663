"""Operators hold the right partners; carrying is encode – matrix – decode; measures agree with slow
references."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.flow.causal import Contexts
from pipeline.flow.functional import codes_from
from pipeline.flow.transitions import (
    Permutation,
    TopK,
    explained_variance,
    matching_score,
    measure_skipping,
    operator,
    rescaled,
    scale_of,
    skipping,
)
from sae import Sae
from sae.activations import Threshold, TopKActivation


def random_sae(n: int = 48, d: int = 16, *, seed: int = 0, theta: float | None = None) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    kind = (
        TopKActivation(k=6)
        if theta is None
        else Threshold(theta=theta * (0.5 + torch.rand(n, generator=generator)))
    )
    return Sae(
        W_enc=rows + 0.05 * torch.randn(n, d, generator=generator),
        b_enc=torch.zeros(n),
        W_dec=rows,
        b_dec=torch.randn(d, generator=generator),
        b_in=torch.zeros(d),
        activation=kind,
    )


@pytest.mark.parametrize("of", ["source", "target"])
@pytest.mark.parametrize("k", [1, 3])
def test_partners_are_those_of_a_full_sort(k: int, of) -> None:
    a, b = random_sae(20, seed=1), random_sae(30, seed=2)
    similarity = (a.W_dec @ b.W_dec.T + a.W_enc @ b.W_enc.T).numpy()
    got = operator(a, b, TopK(k=k, of=of, weights="dec-dec+enc-enc", indicator=False)).toarray()
    axis = 1 if of == "source" else 0
    edge = np.sort(similarity, axis=axis).take([-k], axis=axis)
    np.testing.assert_allclose(
        got, np.where((similarity >= edge) & (similarity > 0), similarity, 0.0), atol=1e-6
    )
    ones = operator(a, b, TopK(k=k, of=of, weights="dec-dec+enc-enc")).toarray()
    np.testing.assert_array_equal(ones, (got > 0).astype(np.float32))


def test_decoder_against_encoder_is_not_symmetric() -> None:
    a, b = random_sae(20, seed=1), random_sae(30, seed=2)
    got = operator(a, b, TopK(weights="dec-enc")).toarray()
    np.testing.assert_array_equal(got.argmax(1), (a.W_dec @ b.W_enc.T).numpy().argmax(1))


def test_folding_is_rescaling_of_latents() -> None:
    """Between two dictionaries that differ in scale only, folding carries exactly; without it the
    scale is wrong."""
    a = random_sae(theta=0.3)
    assert isinstance(a.activation, Threshold)
    b = a.replace(
        W_enc=3 * a.W_enc, activation=Threshold(theta=3 * a.activation.theta), W_dec=a.W_dec / 3
    )
    x = torch.randn(200, 16)
    matrix = operator(a, b, Permutation())
    carried = rescaled(matrix, scale_of(a), scale_of(b))
    torch.testing.assert_close(skipping(a, b, carried)(x), b(x), rtol=1e-4, atol=1e-5)
    assert explained_variance(skipping(a, b, matrix), [(x, b(x))]) < 0.9
    folded_rows = (a.W_dec * a.activation.theta[:, None]) @ (
        b.W_dec * 3 * a.activation.theta[:, None]
    ).T
    found = operator(a, b, TopK(fold=True)).toarray()
    np.testing.assert_array_equal(found.argmax(1), folded_rows.numpy().argmax(1))


def test_scale_without_thresholds_is_the_mean_while_active() -> None:
    sae = random_sae(6)
    wide = codes_from(sparse.csr_matrix(np.array([[2.0, 0, 0, 0, 0, 0], [4.0, 1.0, 0, 0, 0, 0]])))
    np.testing.assert_allclose(scale_of(sae, wide), [3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(scale_of(sae), np.ones(6))


def test_skipping_is_encode_matrix_decode() -> None:
    a, b = random_sae(20, seed=1), random_sae(30, seed=2)
    matrix = operator(a, b, TopK(k=2, indicator=False))
    x = torch.randn(40, 16)
    slow = b.decode(a.encode(x) @ torch.from_numpy(matrix.toarray()))
    torch.testing.assert_close(skipping(a, b, matrix)(x), slow, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="does not fit"):
        skipping(b, a, matrix)


def test_explained_variance_is_one_minus_the_unexplained_share() -> None:
    x = torch.randn(100, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 7.0
    batches = list(zip(x.split(30), x.split(30), strict=True))
    assert explained_variance(lambda v: v, batches) == pytest.approx(1.0)
    assert explained_variance(lambda v: x.mean(0).expand_as(v), batches) == pytest.approx(
        0.0, abs=1e-6
    )
    assert explained_variance(lambda v: v + 1.0, batches) == pytest.approx(
        1 - 400 / float((x - x.mean(0)).square().sum()), abs=1e-6
    )
    assert np.isnan(explained_variance(lambda v: v, []))


def test_matching_score_by_hand() -> None:
    source = codes_from(
        sparse.csr_matrix(np.array([[1.0, 0, 1], [1.0, 2, 1], [0, 3, 1], [1.0, 0, 1]]))
    )
    target = codes_from(sparse.csr_matrix(np.array([[0, 1.0], [5.0, 0], [1.0, 0], [1.0, 1]])))
    matrix = sparse.csr_matrix(np.array([[1.0, 0], [1.0, 1], [0, 0]]))
    score = matching_score(matrix, source, target)
    assert (score.n_activations, score.of_activations) == (5, pytest.approx(4 / 5))
    assert score.of_latents == pytest.approx((2 / 3 + 1) / 2)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=3, d_model=32, n_heads=4, d_mlp=64, seed=1), dtype="float32"
    )


def test_skipping_changes_the_loss_as_a_full_run_with_the_spliced_stream_does(
    model: LanguageModel,
) -> None:
    ids = np.random.default_rng(0).integers(0, 400, size=(3, 10)).astype(np.int64)
    usable = np.ones_like(ids, dtype=bool)
    usable[:, 0] = False
    contexts = Contexts(ids=ids, document=np.arange(3)[:, None].repeat(10, 1), usable=usable)
    source, target = Site(0, "resid_post"), Site(1, "resid_post")
    sae = random_sae(60, 32)
    clean = model.activations(torch.from_numpy(ids), (source, target))
    predictors = {"itself": lambda x: clean[target][: len(x)], "carried": sae}
    table = measure_skipping(
        model, contexts, source=source, target=target, predictors=predictors, batch_size=3
    ).set_index(["predictor", "context"])
    assert table.loc["itself", "delta_ce"].abs().max() < 1e-4
    spliced = torch.where(torch.from_numpy(usable)[..., None], sae(clean[source]), clean[target])
    with model.edited({target: lambda value: spliced}):
        log_p = model.logits(torch.from_numpy(ids)).float().log_softmax(-1)
    for context in range(3):
        loss = [-float(log_p[context, t, ids[context, t + 1]]) for t in range(1, 9)]
        assert table.loc[("carried", context), "ce"] == pytest.approx(np.mean(loss), abs=1e-4)
        assert table.loc[("carried", context), "n"] == 8
