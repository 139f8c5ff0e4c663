"""A few latents of a TopK encoder: the same as in the whole encoder, ties included, with less of
the product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sae.selected
from sae import Sae, TopKActivation

N_LATENTS, D_IN = 300, 6


def _sae(W_enc: torch.Tensor, b_enc: torch.Tensor, k: int) -> Sae:
    return Sae(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_enc,
        b_dec=torch.zeros(W_enc.shape[1]),
        b_in=torch.ones(W_enc.shape[1]),
        activation=TopKActivation(k=k),
    )


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, N_LATENTS),
    n=st.integers(0, 12),
    n_chosen=st.integers(1, 10),
    spread=st.integers(1, 3),
    shift=st.integers(-3, 3),
)
def test_selected_latents_are_those_of_the_encoder_to_the_bit_where_many_are_equal(
    seed, k, n, n_chosen, spread, shift
):
    """Whole numbers: every product is exact, so equal pre-activations are really equal, and there
    are many."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-spread, spread + 1, shape, generator=generator).float()

    one = _sae(whole(N_LATENTS, D_IN), whole(N_LATENTS) + shift, k)
    x, chosen = whole(n, D_IN), torch.randint(0, N_LATENTS, (n_chosen,), generator=generator)
    assert torch.equal(one.encode_selected(x, chosen), one.encode(x)[:, chosen])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_selected_latents_of_real_numbers_switch_alike(scale):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(1000, 48, generator=generator)
    one = _sae(W, torch.randn(1000, generator=generator) * scale, k=20)
    x = scale * torch.randn(400, 48, generator=generator)
    z = one.encode(x)
    for latent in (0, 1, 500, 999):
        found = one.encode_selected(x, [latent])[:, 0]
        assert torch.equal(found > 0, z[:, latent] > 0)
        torch.testing.assert_close(found, z[:, latent])


def test_a_row_is_left_as_soon_as_k_columns_lie_above(monkeypatch):
    """A latent that fires in no row is known to after the first block; one that always fires needs
    every column."""
    multiplied = []
    linear = torch.nn.functional.linear

    def counted(x, W, b):
        multiplied.append(len(x) * len(W))
        return linear(x, W, b)

    monkeypatch.setattr(sae.selected.F, "linear", counted)
    n, n_latents, k = 50, 1024, 8
    W = torch.ones(n_latents, 4)
    b = torch.zeros(n_latents)
    b[0], b[1] = -1.0, 1.0
    one, x = _sae(W, b, k), torch.full((n, 4), 2.0)
    assert (one.encode_selected(x, [0]) == 0).all()
    assert sum(multiplied) == n * (1 + 128)
    multiplied.clear()
    assert (one.encode_selected(x, [1]) == 5).all()
    assert sum(multiplied) == n * (1 + n_latents)


@pytest.mark.parametrize(("n_above", "is_on"), [(7, True), (8, False)])
def test_the_kth_latent_is_on_although_the_first_block_has_all_that_lie_above_it(n_above, is_on):
    """k = 8. Broken on purpose, one run of the drawn examples missed it and one did not."""
    b = torch.zeros(1024)
    b[:n_above], b[1000] = 10.0, 5.0
    one, x = _sae(torch.zeros(1024, 4), b, k=8), torch.ones(3, 4)
    found = one.encode_selected(x, [1000])
    assert torch.equal(found, one.encode(x)[:, [1000]])
    assert bool((found > 0).all()) == is_on


@pytest.mark.parametrize("k", [1, 8, 200])
def test_nan_is_handed_on_where_the_encoder_hands_it_on_and_takes_its_place_among_the_k(k):
    """Rows without NaN, all NaN, with an infinity; and latents whose own weights are NaN beside
    sound ones."""
    generator = torch.Generator().manual_seed(2)
    W, b = torch.randn(1024, 8, generator=generator), torch.randn(1024, generator=generator)
    x = torch.randn(40, 8, generator=generator)
    x[3], x[7, 2], x[11, 0], x[12, 1], x[13] = torch.nan, torch.nan, torch.inf, -torch.inf, 1e30
    W[5] = 0.0  # times a norm that overflows: the bar is NaN and the pre-activation is not
    for broken in ([], [500], [0, 1, 2, 900, 901]):
        b[broken] = torch.nan
        one = _sae(W, b, k)
        z = one.encode(x)
        assert z.isnan().any()
        for chosen in ([0], [500], [1023], [5, 500, 901]):
            torch.testing.assert_close(one.encode_selected(x, chosen), z[:, chosen], equal_nan=True)


def test_a_latent_with_nan_is_never_said_to_be_silent():
    b = torch.zeros(64)
    b[5] = torch.nan
    one, x = _sae(torch.ones(64, 4), b, k=3), torch.ones(2, 4) + 1
    assert one.encode(x)[:, 5].isnan().all()
    assert one.encode_selected(x, [5]).isnan().all()
    assert one.encode_selected(x, [5, 9]).isnan().any(-1).all()
