"""In a model whose blocks add nothing, effects are inner products; in the tiny one, gradients agree
with real removal better than cosines do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.model.language_model import LanguageModel
from featureflow.sites import parse_site
from pipeline.cli import run_command
from pipeline.lenses import attribution, size_vs_use
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.held_out import choose_contexts
from pipeline.run import Run

L1, L2 = parse_site("L1"), parse_site("L2")


def test_without_blocks_every_score_is_the_inner_product(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel.open(run._spec, dtype="float32")
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attention, block.mlp):
                assert part is not None
                for weight in part.parameters():
                    weight.zero_()
    monkeypatch.setitem(run.__dict__, "exact_model", model)
    contexts = choose_contexts(run, Sampled(), 100)
    config = attribution.Config(n_rounds=1, n_checked=4)
    pair = attribution.Pair.of(run, L1, L2, contexts, config)
    latent, g = pair.drawn[0]
    torch.testing.assert_close(g[latent >= 0], run.saes[L2].W_enc[latent[latent >= 0]])
    trials = pair.checked()
    for way in ("gradient", "shared pass"):
        np.testing.assert_allclose(trials[way], trials["removal"], rtol=1e-3, atol=1e-4)
    links = pair.links(np.arange(64))
    for row in links.to_dict("records"):
        i, j = (int(row[end].rpartition("/")[2]) for end in ("source_feature", "target_feature"))
        assert i == j
        both = (latent == j) & (pair.z[..., i] > 0)
        unit = float(run.saes[L1].W_dec[i] @ run.saes[L2].W_enc[j])
        assert row["gradient_effect"] == pytest.approx(
            float(pair.z[..., i][both].mean()) * unit, rel=1e-3, abs=1e-5
        )
        assert row["n"] == int(both.sum())


def test_gradients_agree_with_removal_better_than_cosines(run: Run) -> None:
    config = attribution.Config(n_pairs=2, n_tokens=400, n_checked=10, gaps=(1,))
    table = attribution.look(run, config).tables["agreement"].set_index("way")["spearman"]
    assert table["gradient"] > 0.8
    assert table["gradient"] > table["cosine"] + 0.05
    assert abs(table["another target"]) < 0.4


def test_use_is_what_removal_costs_and_size_a_share_of_variance(run: Run) -> None:
    finding = size_vs_use.look(run, size_vs_use.Config(n_tokens=300, n_checked=20))
    assert finding.headline["spearman use and removal"] > 0.8
    site = parse_site("L1.mlp")
    contexts = choose_contexts(run, Sampled(), 300)
    with torch.no_grad():
        x = run.exact_model.activations(contexts.ids, [site])[site][contexts.spliced]
    z = run.saes[site].encode(x).numpy()
    mean = run.store.statistics(site).mean
    share = (z**2).sum(0) / ((x.numpy() - mean) ** 2).sum()
    table = finding.tables["features"].set_index("feature")
    for latent in np.flatnonzero((z > 0).sum(0) >= 5)[:10]:
        row = table.loc[f"L1.mlp/{latent}"]
        assert row["variance_share"] == pytest.approx(share[latent], rel=1e-3)
        assert row["use_low"] <= row["use"] <= row["use_high"]


def test_the_loss_is_cross_entropy_over_what_counts() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids, counted = torch.randint(7, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    counted[0, 1] = counted[1, 3] = True
    own = torch.nn.functional.cross_entropy(
        torch.stack([logits[0, 1], logits[1, 3]]),
        torch.stack([ids[0, 2], ids[1, 4]]),
        reduction="sum",
    )
    torch.testing.assert_close(size_vs_use.loss(logits, ids, counted), own)


def test_links_show_the_effect_that_was_measured_on_this_graph_and_none_of_another(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(artifacts / "tiny", folder)
    look = ["lens", "attribution", "--n-pairs", "2", "--n-tokens", "300", "--n-checked", "0"]
    assert run_command([*look, "--artifacts", str(tmp_path), "--recipe", "tiny", "-q"]) == 0
    run = Run.open(folder)
    table = run.lens("attribution").tables["edges"]
    effect = dict(
        zip(zip(table["source_feature"], table["target_feature"], strict=True),
            table["gradient_effect"], strict=True)
    )  # fmt: skip
    links = run.graph.links
    names = [(str(run.graph.feature(s)), str(run.graph.feature(t)))
             for s, t in zip(links["source"], links["target"], strict=True)]  # fmt: skip
    assert sum(name in effect for name in names) > 3
    np.testing.assert_array_equal(
        links["gradient_effect"], [effect.get(name, np.nan) for name in names]
    )
    (source, target) = next(name for name in names if name in effect)
    assert (
        run_command(["flow", "show", target, "--artifacts", str(tmp_path), "--recipe", "tiny"]) == 0
    )
    assert f"gradient {effect[source, target]:+.2f}" in capsys.readouterr().out
    lens = folder / "lenses" / "attribution" / "manifest.json"
    manifest = json.loads(lens.read_text())
    manifest["inputs"]["link"] = "0" * 64
    lens.write_text(json.dumps(manifest))
    assert "gradient_effect" not in Run.open(folder).graph.links
