"""The peers themselves write and read: their latents and reconstructions are ours.

Needs the peers' environments (benchmarks/peers/make_environments.sh) under the folder
FEATUREFLOW_PEERS.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from sae import Gated, Relu, Sae, Threshold, TopKActivation
from sae.formats import read, write_saelens

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "peers"
D, N, TOKENS = 24, 96, 200


def run_peer(peer: str, *arguments: str) -> list[dict]:
    root = os.environ.get("FEATUREFLOW_PEERS")
    python = Path(root or "") / peer / "bin" / "python"
    if root is None or not python.is_file():
        pytest.skip(
            f"no environment for {peer}: bash benchmarks/peers/make_environments.sh, then "
            "FEATUREFLOW_PEERS"
        )
    command = [str(python), str(SCRIPTS / f"check_{peer}.py"), *arguments]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
