"""The evaluation lenses measure what their words say: on a tiny random model, against plain loops
and known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel, Random
from data.store import ActivationStore, RowFilters
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.lenses import loss_recovered, reconstruction
from pipeline.lenses.base import LensConfig, Sampled, find_lens, run_lens
from pipeline.lenses.loss_recovered import Spliced, measure_recovery
from pipeline.lenses.parts.held_out import choose_contexts, choose_rows
from pipeline.run import Run
from pipeline.stages import collect
from sae import Relu, Sae, TopKActivation, save_sae
from sae.formats import write_saelens

MODEL = Random(n_layers=3, d_model=16, n_heads=2, d_mlp=32, scale=3.0)
SITES = ("resid_post", "mlp_out:1")
D = 16


def perfect(d=D):
    """x̂ = relu(x) − relu(−x) = x, with d latents active on every token."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    zeros = torch.zeros(d)
    return Sae(
        W_enc=both, b_enc=torch.zeros(2 * d), W_dec=both, b_dec=zeros, b_in=zeros, activation=Relu()
    )


def rough(seed, k=4):
    W = torch.nn.functional.normalize(
        torch.randn(40, D, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    zeros = torch.zeros(D)
    return Sae(
        W_enc=W,
        b_enc=torch.zeros(40),
        W_dec=W,
        b_dec=zeros,
        b_in=zeros,
        activation=TopKActivation(k=k),
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Artifact:
    config = collect.Config(
        model=MODEL,
        corpus=BundledText(),
        sites=SITES,
        n_context=32,
        n_tokens=4096,
        max_document_tokens=150,
        validation_fraction=0.25,
        model_dtype="float32",
        dtype="float32",
        shard_rows=1024,
        chunk_rows=128,
    )
    return collect.run(
        config, collect.Inputs(), tmp_path_factory.mktemp("collect") / "collect", RunContext()
    )


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(MODEL, dtype="float32")


def train_artifact(folder: Path, dictionaries: dict[str, Sae]) -> Artifact:
    with Artifact.create(folder, kind="train", schema=1, config={}, inputs={}) as draft:
        for name, sae in dictionaries.items():
            save_sae(sae, draft.path / "dictionaries" / name)
    return Artifact.open(folder, kind="train", schema=1)


def measured(collected, tmp_path, saes, **options) -> Run:
    """The run after `reconstruction` looked."""
    run = Run.of({"collect": collected, "train": train_artifact(tmp_path / "train", saes)})
    run.root = tmp_path
    small = {"n_tokens": 600, "n_pca_tokens": 600, "n_resamples": 50} | options
    run_lens("reconstruction", run, reconstruction.Config(**small))
    return run


def metrics(run: Run) -> pd.DataFrame:
    return run.lens("reconstruction").tables["metrics"]


def losses(run: Run, **options) -> pd.DataFrame:
    config = loss_recovered.Config(**{"n_tokens": 200, "n_resamples": 50} | options)
    return loss_recovered.look(run, config).tables["losses"]


def test_a_perfect_sae_loses_nothing_and_a_rough_one_something(collected, tmp_path):
    saes = {"L0": perfect(), "L1": rough(1), "L1.mlp": perfect(), "L2": rough(2)}
    run = measured(collected, tmp_path, saes)
    rows = metrics(run).set_index("site")
    assert rows.loc["L0", "fvu"] == pytest.approx(0, abs=1e-9)
    assert rows.loc["L0", "l0"] == pytest.approx(D)
    assert rows.loc["L1", "l0"] <= 4
    assert rows.loc["L1", "fvu_low"] <= rows.loc["L1", "fvu"] <= rows.loc["L1", "fvu_high"]
    assert run.lens("reconstruction").headline["n_dictionaries"] == 4
    found = losses(run).set_index("site")
    assert set(found.index) == {"L0", "L1", "L2"}, "spread over the residual stream"
    assert found.loc["L0", "ce_spliced"] == pytest.approx(found.loc["L0", "ce_original"], abs=1e-5)
    assert found.loc["L0", "kl_spliced"] == pytest.approx(0, abs=1e-5)
    assert found.loc["L0", "kl_recovered_mean"] == pytest.approx(1, abs=1e-4)
    assert found.loc["L1", "kl_spliced"] > 1e-3


def test_the_pca_baseline_is_that_of_the_rows_used(collected, tmp_path):
    row = metrics(measured(collected, tmp_path, {"L1": rough(1)})).iloc[0]
    store = ActivationStore.open(collected.path / "store.zarr")

    def rows_of(split):
        blocks = choose_rows(Run.of({"collect": collected}), Sampled(), 600, split=split)
        return np.concatenate(
            [store.read(Site(1, "resid_post"), 0, store.n_rows)[b] for b in blocks]
        ).astype(np.float64)

    train, held_out = rows_of("train"), rows_of("validation")
    mean = train.mean(0)
    basis = np.linalg.svd(train - mean, full_matrices=False)[2][: round(row["l0"])]
    left = (held_out - mean) - (held_out - mean) @ basis.T @ basis
    assert row["pca_fvu"] == pytest.approx(
        (left**2).sum() / ((held_out - held_out.mean(0)) ** 2).sum(), rel=1e-5
    )


def test_rows_come_from_held_out_documents_only_and_as_many_as_asked(collected):
    store = ActivationStore.open(collected.path / "store.zarr")
    for split, n in (("validation", 333), ("train", 500)):
        rows = np.concatenate(
            choose_rows(Run.of({"collect": collected}), Sampled(seed=3), n, split=split)
        )
        assert len(rows) == n == len(set(rows.tolist()))
        assert ((rows >= store.validation_start) == (split == "validation")).all()
        assert (store.tokens().flags[rows] == 0).all()
    everything = np.concatenate(choose_rows(Run.of({"collect": collected}), Sampled(seed=3), 10**9))
    assert (everything == store.kept_rows("validation")).all()


def test_loss_is_counted_where_an_ordinary_token_follows_a_spliced_one(collected, model):
    store = ActivationStore.open(collected.path / "store.zarr")
    contexts = choose_contexts(Run.of({"collect": collected}), Sampled(), 10**9)
    special = torch.tensor(sorted(model.tokenizer.special_ids))
    before, following = contexts.spliced[:, :-1], torch.isin(contexts.ids[:, 1:], special)
    assert (before & following).any()
    assert (contexts.counted[:, :-1] == before & ~following).all()
    assert not contexts.counted[:, -1].any()
    assert not contexts.spliced[:, 0].any()  # the BOS keeps its activation
    assert contexts.ids.numel() == store.n_rows - store.validation_start


@pytest.mark.parametrize("site", ["L0", "L1", "L2", "L1.mlp", "L0.attn", "L1.pre", "L2.mid"])
def test_recovery_equals_a_plain_loop_over_whole_forward_passes(collected, model, site):
    """The oracle edits the running model from the first block on, one context at a time, and counts
    by hand."""
    store = ActivationStore.open(collected.path / "store.zarr")
    contexts = choose_contexts(Run.of({"collect": collected}), Sampled(seed=1), 90)
    place, sae, mean = parse_site(site), rough(5), torch.randn(D)
    found = measure_recovery(
        model, [Spliced(name="x", site=place, sae=sae, mean=mean)], contexts, n_resamples=20, seed=0
    )["x"]
    losses = {name: [] for name in ("plain", "sae", "zero", "mean")}
    kl = {name: [] for name in losses}
    for ids, spliced, documents in zip(
        contexts.ids, contexts.spliced, contexts.documents, strict=True
    ):
        flags = store.tokens().flags

        def edit(kind, spliced=spliced):
            def replace(h):
                new = {
                    "sae": sae(h),
                    "zero": torch.zeros_like(h),
                    "mean": mean.expand_as(h),
                    "plain": h,
                }[kind]
                return torch.where(spliced[None, :, None], new, h)

            return replace

        log_p = {}
        for kind in losses:
            with model.edited({place: edit(kind)}):
                log_p[kind] = model.logits(ids[None])[0].log_softmax(-1)
        for t in range(len(ids) - 1):
            next_is_ordinary = int(ids[t + 1]) not in model.tokenizer.special_ids
            if spliced[t] and next_is_ordinary:
                for kind in losses:
                    losses[kind].append(-log_p[kind][t, ids[t + 1]].item())
                    kl[kind].append(
                        (log_p["plain"][t].exp() * (log_p["plain"][t] - log_p[kind][t]))
                        .sum()
                        .item()
                    )
        assert len(documents) == len(ids)
        assert len(flags) == store.n_rows
    ce = {name: float(np.mean(values)) for name, values in losses.items()}
    assert found["ce_n_tokens"] == len(losses["plain"]) == contexts.counted.sum()
    assert (found["ce_original"], found["ce_spliced"]) == pytest.approx(
        (ce["plain"], ce["sae"]), abs=1e-4
    )
    assert (found["ce_zero"], found["ce_mean"]) == pytest.approx((ce["zero"], ce["mean"]), abs=1e-4)
    assert (found["kl_spliced"], found["kl_zero"]) == pytest.approx(
        (np.mean(kl["sae"]), np.mean(kl["zero"])), abs=1e-4
    )
    if ce["zero"] > ce["plain"]:
        expected = (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["plain"])
        assert found["ce_recovered_zero"] == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_other_libraries_dictionaries_share_the_frontier(collected, tmp_path):
    for k in (2, 8):
        write_saelens(
            rough(7, k=k), tmp_path / "sweep" / f"k{k}", hook_name="blocks.1.hook_resid_post"
        )
    others = (str(tmp_path / "sweep"),)
    run = measured(collected, tmp_path, {"L1": rough(1)}, others=others)
    rows = metrics(run)
    assert list(rows["source"]) == ["train", "sweep/k2", "sweep/k8"]
    assert rows["l0"].is_monotonic_increasing is False
    run_lens("frontier", run)
    frontier = run.lens("frontier").tables["frontier"]
    assert set(frontier["source"]) == set(rows["source"])
    [axis] = find_lens("frontier").look(run, LensConfig()).figure().axes
    assert {text.get_text() for text in axis.texts} == set(rows["source"])
    before = run_lens("reconstruction", run, reconstruction.Config(others=others)).digest
    write_saelens(rough(8), tmp_path / "sweep" / "k2", hook_name="blocks.1.hook_resid_post")
    after = run_lens("reconstruction", run, reconstruction.Config(others=others)).digest
    assert before != after, "the other folder's files count"


def test_what_cannot_be_measured_is_refused_with_everything_at_once(collected, tmp_path):
    write_saelens(rough(1), tmp_path / "other" / "a")  # no site
    write_saelens(
        rough(1), tmp_path / "other" / "b", hook_name="blocks.7.hook_resid_post"
    )  # not in the store
    with pytest.raises(UserError) as caught:
        measured(collected, tmp_path, {"L1": rough(1)}, others=(str(tmp_path / "other"),))
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "lenses" / "reconstruction").exists()
    with pytest.raises(UserError, match="another width"):
        measured(collected, tmp_path / "wide", {"L1": perfect(d=8)})
    with pytest.raises(UserError, match="no dictionary to run the model with"):
        losses(measured(collected, tmp_path / "site", {"L1": rough(1)}), sites=("L2",))


def test_a_limit_on_norms_holds_for_the_rows_measured_too(collected):
    store = ActivationStore.open(collected.path / "store.zarr")
    site, filters = Site(2, "resid_post"), RowFilters(max_norm_ratio=1.0)
    rows = np.concatenate(
        choose_rows(Run.of({"collect": collected}), Sampled(filters=filters), 10**9, sites=[site])
    )
    norms = np.linalg.norm(store.read(site, 0, store.n_rows).astype(np.float64), axis=1)
    median = np.median(norms[store.tokens().flags == 0])
    ordinary = np.concatenate(choose_rows(Run.of({"collect": collected}), Sampled(), 10**9))
    assert set(rows) == set(ordinary[norms[ordinary] <= median * 1.0001]) != set(ordinary)


def test_a_killed_look_keeps_the_sites_it_finished(collected, tmp_path, monkeypatch):
    saes = {"L0": rough(1), "L1": rough(2)}
    of_site, asked = reconstruction._of_site, []

    def killed_at_the_second(run, site, *rest):
        asked.append(site.short)
        if asked == ["L0", "L1"]:
            raise KeyboardInterrupt
        return of_site(run, site, *rest)

    monkeypatch.setattr(reconstruction, "_of_site", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measured(collected, tmp_path, saes)
    run = measured(collected, tmp_path, saes)
    assert asked == ["L0", "L1", "L1"], "what was measured before the kill is there"
    assert list(metrics(run)["site"]) == ["L0", "L1"]
    assert not (tmp_path / "lenses" / "reconstruction" / ".kept").exists()
