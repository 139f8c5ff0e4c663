"""The peers themselves write and read: their latents and reconstructions are ours.

Needs the peers' environments (benchmarks/peers/make_environments.sh) under the folder
FEATUREFLOW_PEERS.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from featureflow.sites import Site
from sae import Gated, Relu, Sae, Threshold, TopKActivation
from sae.calibration import with_threshold
from sae.formats import read, read_cross_layer, write_circuit_tracer, write_saelens, write_sparsify
from tests.sae.peers import run_peer

pytestmark = pytest.mark.slow
D, N, TOKENS = 24, 96, 200


def check_ours_reads(folder: Path) -> None:
    case = {name: torch.from_numpy(value) for name, value in np.load(folder / "case.npz").items()}
    raw = read(folder, unit_decoder=False)
    assert (case["latents"] != 0).any()
    torch.testing.assert_close(
        raw.encode(case["x"]), case["latents"], rtol=1e-4, atol=1e-5, msg=folder.name
    )
    for sae in (raw, read(folder)):
        torch.testing.assert_close(
            sae(case["x"]), case["reconstruction"], rtol=1e-4, atol=1e-4, msg=folder.name
        )


@pytest.mark.parametrize(
    ("peer", "n_cases", "arguments"),
    [("saelens", 14, ("write",)), ("sparsify", 4, ()), ("dictionary_learning", 7, ())],
)
def test_what_the_peer_writes_means_the_same_here(tmp_path, peer, n_cases, arguments):
    run_peer(peer, *arguments, str(tmp_path))
    folders = sorted(path.parent for path in tmp_path.glob("*/case.npz"))
    assert len(folders) == n_cases
    for folder in folders:
        check_ours_reads(folder)


def test_what_circuit_tracer_writes_means_the_same_here(tmp_path):
    run_peer("circuit_tracer", "write", str(tmp_path))
    for name in ("relu", "jumprelu", "skip"):
        case = load_case(tmp_path / name)
        for layer, x in enumerate(case["x"]):
            sae = read(tmp_path / name / f"layer_{layer}.safetensors", unit_decoder=False)
            torch.testing.assert_close(sae.encode(x), case["latents"][layer], rtol=1e-4, atol=1e-5)
            out = case["reconstruction"][layer]
            torch.testing.assert_close(sae(x), out, rtol=1e-4, atol=1e-4)
    for name in ("clt_relu", "clt_jumprelu"):
        case, whole = load_case(tmp_path / name), read_cross_layer(tmp_path / name)
        found = whole(dict(zip(whole.reads, case["x"], strict=True)))
        for site, out in zip(whole.writes, case["reconstruction"], strict=True):
            torch.testing.assert_close(found[site], out, rtol=1e-4, atol=1e-4)


def load_case(folder: Path) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(value) for n, value in np.load(folder / "case.npz").items()}


def ours() -> dict[str, Sae]:
    g = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=g)

    def dictionary(activation, *, d_out=D, skip=False, same_bias=True):
        W_dec = torch.nn.functional.normalize(numbers(N, d_out), dim=1)
        b_dec = numbers(d_out)
        return Sae(
            W_enc=numbers(N, D) * 0.3,
            b_enc=numbers(N) * 0.3,
            W_dec=W_dec,
            b_dec=b_dec,
            b_in=b_dec.clone() if same_bias and d_out == D else numbers(D),
            activation=activation,
            W_skip=numbers(d_out, D) if skip else None,
        )

    return {
        "relu": dictionary(Relu()),
        "topk": dictionary(TopKActivation(k=5)),
        "topk_other_bias": dictionary(TopKActivation(k=5), same_bias=False),
        "threshold": dictionary(Threshold(theta=numbers(N).abs())),
        "gated": dictionary(Gated(gain=numbers(N).exp(), offset=numbers(N))),
        "transcoder": dictionary(Relu(), d_out=20),
        "skip_transcoder": dictionary(Threshold(theta=numbers(N).abs()), d_out=20, skip=True),
    }


def test_saelens_opens_what_we_write_and_computes_the_same(tmp_path):
    for name, sae in ours().items():
        write_saelens(
            sae, tmp_path / name, hook_name="blocks.3.hook_resid_post", model_name="a-model"
        )
        x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))
        arrays = {"x": x, "latents": sae.encode(x), "reconstruction": sae(x)}
        np.savez(
            tmp_path / name / "case.npz", **{key: value.numpy() for key, value in arrays.items()}
        )
    records = {record["case"]: record for record in run_peer("saelens", "read", str(tmp_path))}
    assert set(records) == set(ours())
    for record in records.values():
        assert record["same_active"], record
        assert record["active"] > 0
        assert record["latents_difference"] < 2e-6, record
        assert record["reconstruction_difference"] < 2e-6, record


def close(record: dict) -> bool:
    return record["same_active"] and record["active"] and record["reconstruction_difference"] < 2e-6


def test_sparsify_opens_what_we_write_and_computes_the_same(tmp_path):
    topk = TopKActivation(k=5)
    for name, options in {
        "sae": {},
        "other_bias": {"same_bias": False},
        "transcoder": {"reads": True},
        "skip_transcoder": {"reads": True, "skip": True},
    }.items():
        sae = dictionary(topk, seed=len(name), **options)
        write_sparsify(sae, tmp_path / name)
        save_case(sae, tmp_path / name)
    records = run_peer("sparsify", str(tmp_path), "--read")
    assert len(records) == 4
    assert all(map(close, records)), records


def test_circuit_tracer_opens_what_we_write_and_computes_the_same(tmp_path):
    for name, activation in {
        "relu": Relu(),
        "jumprelu": Threshold(theta=torch.rand(N)),
        "topk": TopKActivation(k=5),
    }.items():
        saes = {
            Site(layer, "mlp_out"): dictionary(
                activation, seed=layer, reads=True, skip=name == "relu", same_bias=False
            )
            for layer in range(3)
        }
        if name == "topk":
            rows = torch.randn(500, D, generator=torch.Generator().manual_seed(2))
            saes = {site: with_threshold(sae, rows) for site, sae in saes.items()}
        write_circuit_tracer(saes, tmp_path / name, model_name="a-model")
        g = torch.Generator().manual_seed(1)
        x = [torch.randn(TOKENS, D, generator=g) for _ in saes]
        pairs = list(zip(saes.values(), x, strict=True))
        arrays = {"x": torch.stack(x), "latents": torch.stack([s.encode(a) for s, a in pairs])}
        arrays["reconstruction"] = torch.stack([s(a) for s, a in pairs])
        np.savez(tmp_path / name / "case.npz", **{n: a.numpy() for n, a in arrays.items()})
    records = run_peer("circuit_tracer", "read", str(tmp_path))
    assert len(records) == 3
    assert all(map(close, records)), records


def dictionary(activation, *, seed, reads=False, skip=False, same_bias=True) -> Sae:
    g = torch.Generator().manual_seed(seed)
    b_dec = torch.randn(D, generator=g)
    return Sae(
        W_enc=torch.randn(N, D, generator=g) * 0.3,
        b_enc=torch.randn(N, generator=g) * 0.3,
        W_dec=torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1),
        b_dec=b_dec,
        b_in=b_dec.clone() if same_bias else torch.randn(D, generator=g),
        activation=activation,
        W_skip=torch.randn(D, D, generator=g) if skip else None,
        metadata={"reads": "blocks.3.hook_resid_mid"} if reads else {},
    )


def save_case(sae: Sae, folder: Path) -> None:
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))
    arrays = {"x": x, "latents": sae.encode(x), "reconstruction": sae(x)}
    np.savez(folder / "case.npz", **{name: array.numpy() for name, array in arrays.items()})
