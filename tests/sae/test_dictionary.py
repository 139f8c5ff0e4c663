"""The inference form: every way to encode agrees with a slow reference; files give back what was
saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from featureflow.errors import UserError
from sae import Activation, Gated, Relu, Sae, Threshold, TopKActivation, load_sae, save_sae

N_LATENTS, D_IN, D_OUT, N_TOKENS = 24, 6, 6, 17


def _activations() -> list[Activation]:
    generator = torch.Generator().manual_seed(5)
    draw = torch.rand(3, N_LATENTS, generator=generator)
    return [
        Relu(),
        TopKActivation(k=4),
        TopKActivation(k=N_LATENTS),
        Threshold(theta=draw[0]),
        Gated(gain=draw[1] + 0.5, offset=draw[2] - 0.3),
    ]


def _sae(activation: Activation, *, d_out: int = D_OUT, skip: bool = False) -> Sae:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.randn(N_LATENTS, d_out, generator=generator)
    return Sae(
        W_enc=torch.randn(N_LATENTS, D_IN, generator=generator),
        b_enc=torch.randn(N_LATENTS, generator=generator) * 0.2,
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=torch.randn(d_out, generator=generator),
        b_in=torch.randn(D_IN, generator=generator),
        activation=activation,
        W_skip=torch.randn(d_out, D_IN, generator=generator) if skip else None,
        metadata={"site": "blocks.0.hook_resid_post"},
    )


def _tokens() -> Tensor:
    return torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(2)) * 2


def _latents_by_hand(sae: Sae, x: Tensor) -> np.ndarray:
    """Token by token and latent by latent, in NumPy float64, from the papers' formulas."""
    weights, bias = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
    z = np.zeros((len(x), sae.n_latents))
    for row, token in enumerate(x.double().numpy()):
        pre = np.array(
            [
                weights[i] @ (token - sae.b_in.double().numpy()) + bias[i]
                for i in range(sae.n_latents)
            ]
        )
        kept = (
            np.argsort(-pre)[: sae.activation.k]
            if isinstance(sae.activation, TopKActivation)
            else range(len(pre))
        )
        for i in kept:
            match sae.activation:
                case Threshold(theta=theta):
                    z[row, i] = pre[i] if pre[i] > theta[i] else 0
                case Gated(gain=gain, offset=offset):
                    z[row, i] = max(gain[i] * pre[i] + offset[i], 0) if pre[i] > 0 else 0
                case _:
                    z[row, i] = max(pre[i], 0)
    return z


@pytest.mark.parametrize("activation", _activations(), ids=lambda a: a.kind)
def test_latents_and_reconstruction_follow_the_formulas(activation: Activation) -> None:
    sae, x = _sae(activation, skip=True), _tokens()
    expected = _latents_by_hand(sae, x)
    np.testing.assert_allclose(sae.encode(x).numpy(), expected, atol=1e-5)
    reconstruction = (
        expected @ sae.W_dec.numpy() + sae.b_dec.numpy() + x.numpy() @ sae.W_skip.numpy().T
    )
    np.testing.assert_allclose(sae(x).numpy(), reconstruction, atol=1e-4)


@pytest.mark.parametrize("activation", _activations(), ids=lambda a: a.kind)
def test_sparse_and_selected_latents_are_those_of_the_dense_encoder(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sae.dictionary._BLOCK_BYTES", 4 * N_LATENTS * 5
    )  # five tokens a block, the last one ragged
    sae, x = _sae(activation), _tokens()
    dense, codes = sae.encode(x), sae.encode_sparse(x)
    torch.testing.assert_close(codes.dense(), dense)
    torch.testing.assert_close(sae.decode(codes), sae.decode(dense))
    assert all(len(set(row)) == len(row) for row in codes.index.tolist())
    chosen = [3, 0, 3, 20]
    torch.testing.assert_close(sae.encode_selected(x, chosen), dense[:, chosen])


def test_leading_axes_are_kept_and_other_dtypes_are_read() -> None:
    sae, x = _sae(TopKActivation(k=4)), _tokens()[:12]
    stacked = x.view(3, 4, D_IN)
    assert sae.encode(stacked).shape == (3, 4, N_LATENTS)
    assert sae.encode_sparse(stacked).index.shape == (3, 4, 4)
    assert sae(stacked).shape == (3, 4, D_OUT)
    assert sae.encode_selected(stacked, [1]).shape == (3, 4, 1)
    torch.testing.assert_close(sae(x.bfloat16()), sae(x.bfloat16().float()))


def test_no_tokens_give_no_latents() -> None:
    for activation in _activations():
        assert _sae(activation).encode_sparse(torch.zeros(0, D_IN)).dense().shape == (0, N_LATENTS)


def test_a_row_with_fewer_positives_than_k_has_empty_slots() -> None:
    sae = _sae(TopKActivation(k=N_LATENTS))
    codes = sae.encode_sparse(_tokens())
    assert (codes.value >= 0).all()
    assert (codes.value == 0).any()


@pytest.mark.parametrize("activation", _activations(), ids=lambda a: a.kind)
def test_what_is_saved_comes_back(activation: Activation, tmp_path: Path) -> None:
    sae, x = _sae(activation, d_out=4, skip=True), _tokens()
    save_sae(sae, tmp_path / "one")
    again = load_sae(tmp_path / "one")
    assert again.metadata == sae.metadata
    assert torch.equal(again(x), sae(x))
    assert torch.equal(again.encode(x), sae.encode(x))


def test_every_misshaped_tensor_is_named() -> None:
    with pytest.raises(UserError) as caught:
        _sae(Relu()).replace(b_dec=torch.zeros(2), activation=Threshold(theta=torch.ones(3)))
    assert all(name in str(caught.value) for name in ("activation.theta", "b_dec"))


def test_k_above_the_width_is_refused() -> None:
    with pytest.raises(UserError, match="do not make a dictionary"):
        _sae(TopKActivation(k=N_LATENTS + 1))


def test_damaged_files_are_refused_with_every_problem(tmp_path: Path) -> None:
    sae = _sae(Relu())
    save_sae(sae.replace(b_dec=torch.full((D_OUT,), float("nan"))), tmp_path)
    with pytest.raises(UserError, match="b_dec"):
        load_sae(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match="cannot be read"):
        load_sae(tmp_path)
    (tmp_path / "sae.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not a native dictionary"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match="no dictionary here"):
        load_sae(tmp_path / "elsewhere")
