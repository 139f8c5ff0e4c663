"""A dictionary that writes into many layers is measured whole, and its edges are what its sources
add to the targets' pre-activations; both against loops written out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.lenses import cross_layer
from pipeline.run import Run
from sae import Relu, Threshold
from sae.cross_layer import CrossLayer, CrossLayerPart
from sae.formats import save_cross_layer

N = 24


def made(run: Run, *, model: str | None = None) -> CrossLayer:
    """A transcoder from the stream before to the MLP's output, of all layers."""
    g = torch.Generator().manual_seed(0)
    outs = [site for site in run.store.sites if site.kind == "mlp_out"]
    ins = [Site(site.layer, "resid_mid") for site in outs]
    ins = [site if site in run.store.sites else Site(site.layer - 1, "resid_post") for site in ins]
    pairs = [(a, b) for a, b in zip(ins, outs, strict=True) if a in run.store.sites]
    d = run.store.width(pairs[0][0])
    parts = tuple(
        CrossLayerPart(
            W_enc=torch.randn(N, d, generator=g) / d**0.5,
            b_enc=torch.randn(N, generator=g) * 0.1,
            W_dec=torch.randn(N, len(pairs) - first, d, generator=g) * 0.1,
            activation=Threshold(theta=torch.rand(N, generator=g)) if first else Relu(),
            first=first,
        )
        for first in range(len(pairs))
    )
    return CrossLayer(
        reads=tuple(a for a, _ in pairs),
        writes=tuple(b for _, b in pairs),
        parts=parts,
        b_dec=tuple(torch.randn(d, generator=g) * 0.1 for _ in pairs),
        W_skip=(torch.randn(d, d, generator=g) * 0.01, *(None for _ in pairs[1:])),
        metadata={"model": model},
    )


def test_what_is_measured_and_who_acts_on_whom(run: Run, tmp_path: Path) -> None:
    whole = made(run)
    assert len(whole.parts) > 1
    save_cross_layer(whole, tmp_path / "clt")
    n_tokens = len(run.store.kept_rows("validation"))
    config = cross_layer.Config(
        folder=str(tmp_path / "clt"), n_tokens=n_tokens, n_latents=N, n_resamples=20
    )
    finding = cross_layer.look(run, config)
    layers, edges = finding.tables["layers"], finding.tables["edges"]

    rows = run.store.kept_rows("validation")
    x = {
        site: torch.from_numpy(run.store.read(site, 0, run.store.n_rows)[rows])
        for site in (*whole.reads, *whole.writes)
    }
    z = []
    for part, site in zip(whole.parts, whole.reads, strict=True):
        pre = x[site] @ part.W_enc.T + part.b_enc
        theta = part.activation.theta if part.first else torch.zeros(N)
        z.append(torch.where(pre > theta, pre, 0.0))
    for o, site in enumerate(whole.writes):
        out = whole.b_dec[o] + (x[whole.reads[0]] @ whole.W_skip[0].T if o == 0 else 0.0)
        alone = out + z[o] @ whole.parts[o].W_dec[:, 0]
        for i in range(o + 1):
            out = out + z[i] @ whole.parts[i].W_dec[:, o - i]
        variance = (x[site] - x[site].mean(0)).square().sum()
        assert layers["fvu"][o] == pytest.approx(float((out - x[site]).square().sum() / variance))
        own = float((alone - x[site]).square().sum() / variance)
        assert layers["fvu_own"][o] == pytest.approx(own)
        assert layers["l0"][o] == pytest.approx(float((z[o] > 0).sum() / len(rows)))
        assert layers["fvu_low"][o] <= layers["fvu"][o] <= layers["fvu_high"][o]

    last = len(whole.parts) - 1
    before = [o for o, site in enumerate(whole.writes) if site < whole.reads[last]]
    mine = edges[
        (edges["source_layer"] == whole.reads[0].layer)
        & (edges["target_layer"] == whole.reads[last].layer)
    ]
    assert len(mine)
    for edge in mine.head(5).itertuples():
        s, t = edge.source_latent, edge.target_latent
        written = sum(whole.parts[0].W_dec[s, o] for o in before)
        weight = float(written @ whole.parts[last].W_enc[t])
        together = float((z[0][:, s] * z[last][:, t]).sum() / z[last][:, t].sum())
        assert edge.virtual_weight == pytest.approx(weight, rel=1e-4)
        assert edge.expected == pytest.approx(weight * together, rel=1e-3)
    assert edges["expected"].abs().is_monotonic_decreasing
    assert finding.figure is not None
    finding.figure()


def test_one_of_another_model_or_width_is_refused(run: Run, tmp_path: Path) -> None:
    save_cross_layer(made(run, model="another"), tmp_path / "clt")
    with pytest.raises(UserError, match="does not fit the store") as error:
        cross_layer.look(run, cross_layer.Config(folder=str(tmp_path / "clt")))
    assert "another model" in str(error.value)
    fits = cross_layer.Config(folder=str(tmp_path / "clt"), model="another", n_resamples=10)
    with pytest.raises(UserError):  # the option names the store's model in the words of the files
        cross_layer.look(run, fits.replace(model="a third"))
    assert len(cross_layer.look(run, fits).tables["layers"])


def test_a_run_without_one_says_so(run: Run) -> None:
    finding = cross_layer.look(run, cross_layer.Config())
    assert "train.imported.cross_layer" in finding.text
    assert not len(finding.tables["layers"])
