"""The hand-written step against PyTorch's own differentiation of the plain formulas, on easy and on
hostile batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae.kernels.select import (
    PerRow,
    Selection,
    WholeBatch,
    encode,
    has_fast_bfloat16,
    largest_of_rows,
)
from sae.kernels.sparse_step import AuxK, sparse_step
from sae.step import Situation
from tests.sae.reference import reference_losses

N, D, T = 96, 12, 40


def _weights(seed: int = 0, *, d_out: int = D, skip: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(N, d_out, generator=generator)
    weights = {
        "W_enc": torch.randn(N, D, generator=generator) / D**0.5,
        "b_enc": torch.randn(N, generator=generator) * 0.1,
        "W_dec": decoder / decoder.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(d_out, generator=generator) * 0.1,
    }
    if skip:
        weights["W_skip"] = torch.randn(d_out, D, generator=generator) * 0.1
    return weights


def _batch(seed: int = 1, d: int = D) -> Tensor:
    return torch.randn(T, d, generator=torch.Generator().manual_seed(seed))


def _compare(
    weights: dict[str, Tensor],
    x: Tensor,
    y: Tensor | None = None,
    *,
    selection: Selection,
    dead: Tensor | None = None,
    k_aux: int = 6,
    ends: tuple[int, ...] | None = None,
) -> None:
    dead = torch.zeros(N, dtype=torch.bool) if dead is None else dead
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    losses = reference_losses(
        leaves,
        x,
        y,
        selection=selection,
        dead=dead,
        auxk_weight=1 / 4,
        auxk_k=k_aux,
        group_ends=ends,
    )
    sum(losses.values()).backward()
    ours = sparse_step(
        weights,
        x,
        y,
        Situation(progress=0.0, dead=dead),
        selection=selection,
        auxk=AuxK(weight=1 / 4, k=k_aux),
        group_ends=None if ends is None else torch.tensor(ends),
    )
    assert set(ours.losses) == set(losses)
    for name, loss in losses.items():
        torch.testing.assert_close(ours.losses[name], loss.detach(), msg=name)
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            ours.gradients[name], leaf.grad, rtol=1e-4, atol=1e-7, msg=f"gradient of {name}"
        )


SELECTIONS = [PerRow(k=4), PerRow(k=1), PerRow(k=N), WholeBatch(k=4), WholeBatch(k=1)]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_gradients_are_those_of_the_plain_formulas(selection: Selection) -> None:
    _compare(_weights(), _batch(), selection=selection)


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("n_dead", [1, 5, 50])
def test_the_auxiliary_loss_reaches_every_weight(selection: Selection, n_dead: int) -> None:
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(3))[:n_dead]] = True
    weights = _weights()
    weights["b_enc"][dead] -= 3.0  # never selected: all their gradient is the auxiliary loss'
    weights["W_enc"][dead] *= 4.0
    _compare(weights, _batch(), selection=selection, dead=dead)
    silent = weights | {"b_enc": weights["b_enc"].clone()}
    step = sparse_step(
        silent,
        _batch(),
        None,
        Situation(progress=0.0, dead=dead),
        selection=PerRow(k=4),
        auxk=AuxK(weight=1.0, k=6),
    )
    assert all(step.gradients[name][dead].abs().sum() > 0 for name in ("W_enc", "b_enc", "W_dec"))


@pytest.mark.parametrize("ends", [(8, 24, N), (1, 2, 3, N), (N,)])
def test_matryoshka_prefixes(ends: tuple[int, ...]) -> None:
    dead = torch.arange(N) % 7 == 0
    _compare(_weights(), _batch(), selection=WholeBatch(k=5), ends=ends, dead=dead)
    _compare(_weights(), _batch(), selection=PerRow(k=5), ends=ends)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_with_and_without_a_linear_part(skip: bool) -> None:
    dead = torch.arange(N) % 5 == 0
    _compare(
        _weights(d_out=7, skip=skip), _batch(), _batch(2, d=7), selection=PerRow(k=4), dead=dead
    )


def test_rows_with_fewer_positives_than_k() -> None:
    weights = _weights()
    weights["b_enc"] -= 1.5
    for selection in (PerRow(k=20), WholeBatch(k=20)):
        _compare(weights, _batch(), selection=selection)


def test_nothing_fires_at_all() -> None:
    weights = _weights()
    weights["b_enc"] -= 100
    for selection in (PerRow(k=4), WholeBatch(k=4)):
        _compare(weights, _batch(), selection=selection)


def test_ties_at_the_edge_keep_the_right_number() -> None:
    weights = _weights()
    weights["W_enc"][1:9], weights["W_dec"][1:9] = weights["W_enc"][0], weights["W_dec"][0]
    weights["b_enc"][:9] = 2.0  # nine identical latents; k = 4 cuts through them
    for selection in (PerRow(k=4), WholeBatch(k=4)):
        step = sparse_step(
            weights,
            _batch(),
            None,
            Situation(progress=0.0, dead=torch.zeros(N, dtype=torch.bool)),
            selection=selection,
            auxk=AuxK(weight=0.0, k=1),
        )
        assert int(step.n_active) == 4 * T
        reference = reference_losses(
            weights,
            _batch(),
            None,
            selection=selection,
            dead=torch.zeros(N, dtype=torch.bool),
            auxk_weight=0.0,
            auxk_k=1,
        )
        torch.testing.assert_close(step.loss, sum(reference.values()))


@pytest.mark.parametrize(("n", "k"), [(64, 2), (512, 8), (512, 32), (200, 10), (4096, 32)])
def test_the_fast_row_selection_is_exact(n: int, k: int) -> None:
    pre = torch.randn(30, n, generator=torch.Generator().manual_seed(n))
    pre[3] = 0.0
    pre[4, : n // 2] = 7.0
    value, index = largest_of_rows(pre, k)
    assert torch.equal(value.sort(dim=1).values, pre.topk(k, dim=1).values.sort(dim=1).values)
    assert torch.equal(pre.gather(1, index), value)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(512, 8), (40, 8)])
def test_a_latent_that_became_nan_is_selected_whatever_its_sign(
    dtype: torch.dtype, n: int, k: int
) -> None:
    """A processor's own NaN has the sign bit set. A selection that passed over it would hide that
    the training diverged."""
    pre = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    pre[1, 7] = float("nan")
    pre[2, 9] = -torch.tensor(float("nan"))
    pre[3, 11] = float("inf")
    pre[4, :] = float("-inf")
    _, index = largest_of_rows(pre, k)
    assert [7 in index[1], 9 in index[2], 11 in index[3]] == [True] * 3
    assert index[4].tolist() == list(range(k))


@pytest.mark.parametrize("selection", [PerRow(k=4), WholeBatch(k=4)])
def test_the_loss_shows_a_latent_that_became_nan(selection: Selection) -> None:
    weights = _weights()
    weights["W_enc"][5] = -torch.tensor(float("nan"))
    now = Situation(progress=0.0, dead=torch.zeros(N, dtype=torch.bool))
    step = sparse_step(
        weights, _batch(), None, now, selection=selection, auxk=AuxK(weight=0.0, k=1)
    )
    assert step.loss.isnan()


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="the 9 largest of 8"):
        largest_of_rows(torch.zeros(2, 8), 9)


def test_the_batch_selection_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = _batch(), _weights()
    x[:8] *= 5  # the first block is not like the others, so the cut taken from it is far too high
    whole = encode(x, weights["W_enc"], weights["b_enc"], WholeBatch(k=4), "float32")
    monkeypatch.setattr("sae.kernels.select.pre_activation_blocks", _blocks_of_eight)
    blocks = encode(x, weights["W_enc"], weights["b_enc"], WholeBatch(k=4), "float32")
    assert torch.equal(whole.latent, blocks.latent)
    assert torch.equal(whole.start, blocks.start)
    torch.testing.assert_close(whole.value, blocks.value)


def _blocks_of_eight(x: Tensor, W: Tensor, b: Tensor, precision: str) -> list[Tensor]:
    return [part @ W.T + b for part in x.split(8)]


@pytest.mark.skipif(not has_fast_bfloat16(), reason="this CPU has no fast bfloat16")
def test_a_bfloat16_pass_changes_the_selection_not_the_values() -> None:
    x, weights = _batch(), _weights()
    for selection in (PerRow(k=8), WholeBatch(k=8)):
        codes = encode(x, weights["W_enc"], weights["b_enc"], selection, "bfloat16")
        exact = (x @ weights["W_enc"].T + weights["b_enc"]).relu()
        torch.testing.assert_close(codes.value, exact[codes.row(), codes.latent])
        full = encode(x, weights["W_enc"], weights["b_enc"], selection, "float32")
        assert codes.value.sum() > 0.99 * full.value.sum()
