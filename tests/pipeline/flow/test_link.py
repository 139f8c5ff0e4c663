"""Linking as a whole: nulls by start, bad input, workers; and the stage on artifacts of the real
stages before it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.spec import Random
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import IN_LAYER, Site, named_site
from pipeline.context import RunContext
from pipeline.flow.graph import FlowGraph
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import Automatic, FarLayers, LinkOptions, Rotation
from pipeline.flow.pairing import Pair, far_site, pair_sites, start_relation
from pipeline.stages import collect, link, train
from pipeline.training.plan import Chain
from sae.activations import Relu
from sae.architectures import TopK
from sae.cross_layer import CrossLayer, CrossLayerPart
from sae.formats import layers_of, read_cross_layer, save_cross_layer
from sae.formats.native_cross_layer import Decoders

QUICK = LinkOptions(null=Rotation(), n_null=300)
RESIDUAL = [Site(layer, "resid_post") for layer in range(6)]


def rows(n, d=24, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def start(group, parent=None):
    return {"initialisation": {"kind": "shared", "group": group, "parent": parent, "seed": 0}}


def test_pairs_follow_the_computation_and_gaps_are_reported():
    pairing = pair_sites(
        [RESIDUAL[3], RESIDUAL[0], Site(3, "mlp_out"), Site(3, "attn_out"), Site(1, "mlp_out")]
    )
    assert [(str(pair), pair.relation) for pair in pairing.pairs] == [
        ("L0 → L3", "residual"),
        ("L3.attn → L3", "attention"),
        ("L3.mlp → L3", "mlp"),
    ]
    assert any("2 layer(s)" in text for text in pairing.warnings)
    assert any(text.startswith("L1.mlp: no residual") for text in pairing.warnings)
    middle = pair_sites(
        [RESIDUAL[0], Site(1, "resid_mid"), RESIDUAL[1], Site(1, "attn_out"), Site(1, "mlp_out")]
    )
    assert {str(pair) for pair in middle.pairs} == {
        "L0 → L1.mid",
        "L1.attn → L1.mid",
        "L1.mid → L1",
        "L1.mlp → L1",
    }
    with pytest.raises(UserError, match="nothing to link"):
        pair_sites([RESIDUAL[2]])


def test_what_an_mlp_reads_is_no_place_of_the_stream_and_heads_are_a_module():
    """All kinds of one layer: the chain is the three places of the stream."""
    pairing = pair_sites([Site(1, kind) for kind in IN_LAYER])
    assert {(str(pair), pair.relation) for pair in pairing.pairs} == {
        ("L1.pre → L1.mid", "residual"),
        ("L1.mid → L1", "residual"),
        ("L1.z → L1.mid", "attention"),
        ("L1.attn → L1.mid", "attention"),
        ("L1.mlp → L1", "mlp"),
    }
    assert {text.partition(":")[0] for text in pairing.warnings} == {
        "L1.mlp_in",
        "L1.mlp_normalized",
    }


def test_heads_are_linked_by_what_they_write_into_the_stream(dictionary):
    """Latent i of the stream is what latent i of the heads becomes behind a projection of the same
    width; compared without it they have nothing in common."""
    heads, W_O = rows(40), rows(24, d=24, seed=5)
    saes = {
        Site(1, "z"): dictionary(heads, metadata=start("z")),
        RESIDUAL[1]: dictionary(heads @ W_O, metadata=start("stream")),
    }
    edges = link_dictionaries(saes, options=QUICK, projections={Site(1, "z"): W_O}).edges
    best = edges[edges["rank"] == 0]
    assert (best["source_latent"] == best["target_latent"]).all()
    assert best["cosine"].min() > 0.999


def test_layers_of_a_crosscoder_are_linked_by_their_decoder_into_the_later_site(
    tmp_path, dictionary
):
    """Latent i of layer 0 writes into layer 1 what latent 39 − i of layer 1 writes there; its rows
    into its own layer are others. Folders of dictionaries that are not of it change nothing."""
    own = [rows(40, seed=seed) for seed in range(2)]
    whole = CrossLayer(
        reads=tuple(RESIDUAL[:2]),
        writes=tuple(RESIDUAL[:2]),
        parts=(
            part(rows(40, seed=7), torch.stack([own[0], own[1].flip(0)], 1)),
            part(rows(40, seed=8), torch.stack([rows(40, seed=9), own[1]], 1)),
        ),
        b_dec=(torch.zeros(24),) * 2,
        W_skip=(None, None),
    )
    save_cross_layer(whole, tmp_path)
    decoders = Decoders(tmp_path)
    saes = layers_of(read_cross_layer(tmp_path))
    edges = link_dictionaries(saes, options=QUICK, decoders=decoders).edges
    best = edges[edges["rank"] == 0]
    assert (best["source_latent"] == 39 - best["target_latent"]).all()
    assert best["cosine"].min() > 0.999
    others = {site: dictionary(own[site.layer]) for site in saes}
    plain = link_dictionaries(others, options=QUICK).edges
    pd.testing.assert_frame_equal(
        link_dictionaries(others, options=QUICK, decoders=decoders).edges, plain
    )
    assert decoders(RESIDUAL[0], RESIDUAL[2]) is None


def part(encoder: torch.Tensor, decoder: torch.Tensor) -> CrossLayerPart:
    return CrossLayerPart(
        W_enc=encoder, b_enc=torch.zeros(len(encoder)), W_dec=decoder, activation=Relu()
    )


@pytest.mark.parametrize("common", [True, False])
def test_links_of_a_common_start_are_never_reported_as_carried(dictionary, common):
    """Both sides hold the same rows in the same order, as after a start that training hardly
    moved."""
    both = rows(64, d=48)
    saes = {
        site: dictionary(both, metadata=start("one" if common else site.short))
        for site in RESIDUAL[:3]
    }
    numbers = link.summary_of(link_dictionaries(saes, options=QUICK))
    assert numbers["residual_linked_share"] > 0.9
    assert ("carried_share" in numbers) != common
    assert ("same_start_same_number_share" in numbers) == common
    if common:
        assert numbers["same_start_same_number_share"] == 1.0


def test_a_common_start_is_seen_in_the_metadata():
    assert start_relation(start("a"), start("a")) == "same_start"
    assert start_relation(start("a"), start("b")) == "independent"
    assert start_relation({}, start("b")) == "unknown"
    pair = Pair(source=RESIDUAL[0], target=RESIDUAL[1], relation="residual")
    assert far_site(pair, RESIDUAL, None) == RESIDUAL[5]
    assert far_site(pair, RESIDUAL[:3], None) is None


def test_dictionaries_of_an_unknown_start_are_said_to_be(dictionary):
    """One sentence for all pairs: 2 of the 3 pairs here have an end that does not say what it was
    started from."""
    metadata = [start("a"), start("b"), {}, start("c")]
    odd = {
        RESIDUAL[layer]: dictionary(rows(8, seed=layer), metadata=m)
        for layer, m in enumerate(metadata)
    }
    (text,) = (
        text for text in link_dictionaries(odd, options=QUICK).warnings if "started from" in text
    )
    assert text.startswith("2 of 3 pairs:")
    known = {
        site: dictionary(rows(8, seed=site.layer), metadata=start(site.short))
        for site in RESIDUAL[:3]
    }
    assert not any(
        "started from" in text for text in link_dictionaries(known, options=QUICK).warnings
    )


def test_dictionaries_that_do_not_belong_together_are_refused_with_every_reason(dictionary):
    one = dictionary(
        rows(8), metadata={"model_fingerprint": "a" * 64, "site": "blocks.0.hook_resid_post"}
    )
    two = dictionary(
        rows(8), metadata={"model_fingerprint": "b" * 64, "site": "blocks.4.hook_resid_post"}
    )
    with pytest.raises(UserError) as caught:
        link_dictionaries({RESIDUAL[0]: one, RESIDUAL[1]: two}, options=QUICK)
    assert "different models" in str(caught.value)
    assert "another site" in str(caught.value)
    with pytest.raises(UserError, match="different spaces"):
        link_dictionaries({RESIDUAL[0]: one, RESIDUAL[1]: dictionary(rows(8, d=30))}, options=QUICK)


def test_odd_dictionaries_give_warnings_and_never_a_nan_edge(dictionary):
    zero = rows(40, seed=1)
    zero[:3] = 0
    zero[5] = zero[4]
    dictionaries = {
        RESIDUAL[0]: dictionary(rows(1)),
        RESIDUAL[1]: dictionary(rows(40, seed=1)).replace(
            W_dec=torch.nn.functional.normalize(zero, dim=1)
        ),
        RESIDUAL[2]: dictionary(rows(30, seed=2)).replace(W_dec=torch.zeros(30, 24)),
        RESIDUAL[3]: dictionary(rows(30, seed=3)),
    }
    links = link_dictionaries(dictionaries, options=QUICK)
    numbers = links.edges[["cosine", "margin", "p_value", "q_value"]].to_numpy()
    assert np.isfinite(numbers).all()
    assert ((numbers[:, 2:] > 0) & (numbers[:, 2:] <= 1)).all()
    text = "\n".join(links.warnings)
    assert "3 of 40" in text
    assert "repeat" in text
    assert "L2: no latent is alive" in text
    assert not links.edges["target_site"].isin(["L2"]).any()
    assert links.nodes.loc[links.nodes["site"] == "L2", "class"].isna().all()
    assert links.nodes["persistence"].min() == 1


def test_far_layers_stand_in_when_no_null_is_trained(dictionary):
    base = rows(200)
    same = {
        site: dictionary(base + 0.05 * rows(200, seed=9 + i), metadata=start("a"))
        for i, site in enumerate(RESIDUAL)
    }
    links = link_dictionaries(same, options=LinkOptions(null=Automatic(), n_null=500))
    assert links.pairs["null"].str.contains("far layers").all()
    assert links.edges["kept"].sum() == 0, (
        "all layers alike: nothing here is more alike than far layers are"
    )
    apart = {site: dictionary(rows(200, seed=20 + i)) for i, site in enumerate(RESIDUAL)}
    far = link_dictionaries(apart, options=LinkOptions(null=FarLayers(), n_null=500))
    assert far.edges["kept"].mean() < 0.02
    few = link_dictionaries(
        {site: apart[site] for site in RESIDUAL[:2]}, options=LinkOptions(null=FarLayers())
    )
    assert any("rotation used" in text for text in few.warnings)


def test_the_seed_decides_everything(dictionary):
    dictionaries = {site: dictionary(rows(80, seed=i)) for i, site in enumerate(RESIDUAL[:3])}
    first, second = (link_dictionaries(dictionaries, options=QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(first.edges, second.edges)
    pd.testing.assert_frame_equal(first.nodes, second.nodes)


@pytest.mark.slow
def test_workers_give_the_same_graph(dictionary):
    dictionaries = {site: dictionary(rows(60, seed=i)) for i, site in enumerate(RESIDUAL)}
    here = link_dictionaries(dictionaries, options=QUICK)
    there = link_dictionaries(
        dictionaries, options=QUICK, machines=RunContext(scheduler="local", n_workers=2)
    )
    pd.testing.assert_frame_equal(here.edges, there.edges)
    pd.testing.assert_frame_equal(here.nodes, there.nodes)
    pd.testing.assert_frame_equal(here.pairs, there.pairs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A collect and a train artifact of a small random model."""
    folder, context = tmp_path_factory.mktemp("stages"), RunContext(n_threads=1)
    what = collect.Config(
        model=Random(n_layers=3, d_model=32, n_heads=4, d_mlp=64),
        corpus=BundledText(),
        sites=("resid_post", "mlp_out:1"),
        n_context=32,
        n_tokens=4096,
        validation_fraction=0.25,
        shard_rows=1024,
        model_dtype="float32",
    )
    stored = collect.run(what, collect.Inputs(), folder / "collect", context)
    how = train.Config(
        architecture=TopK(k=4),
        n_latents=64,
        steps=40,
        batch_size=256,
        initialisation=Chain(next_steps=20, module_steps=20),
    )
    return stored, train.run(how, train.Inputs(collect=stored), folder / "train", context)


def test_the_stage_writes_a_graph_that_opens(made, tmp_path):
    stored, trained = made
    config = link.Config(n_null=300, functional_tokens=512)
    inputs = link.Inputs(collect=stored, train=trained)
    artifact = link.run(config, inputs, tmp_path / "link", RunContext(n_threads=1))
    assert {"nodes.parquet", "edges.parquet", "pairs.parquet", "warnings.json"} <= set(
        artifact.files
    )
    assert {"figures/link_strength.png", "figures/classes_by_layer.png"} <= set(artifact.files)
    graph = FlowGraph.open(artifact.path)
    assert [site.short for site in graph.sites] == ["L0", "L1.mlp", "L1", "L2"]
    starts = dict(zip(graph.pairs["relation"], graph.pairs["start"], strict=True))
    assert starts == {"residual": "same_start", "mlp": "independent"}
    assert (
        graph.pairs["null"].str.contains("same start") == (graph.pairs["relation"] == "residual")
    ).all()
    assert graph.edges["pearson"].notna().all()
    assert artifact.summary["n_links"] == int(graph.edges["kept"].sum())
    chosen = graph.edges[graph.edges["kept"]]
    assert (chosen["q_value"] <= 0.05).all()
    again = link.run(config, inputs, tmp_path / "again", RunContext(n_threads=1))
    assert again.digest == artifact.digest
    assert (tmp_path / "again" / "edges.parquet").read_bytes() == (
        artifact.path / "edges.parquet"
    ).read_bytes()


@pytest.mark.parametrize("widths", [(12, 20), (20, 12)])
def test_sites_of_different_width_are_linked_through_held_out_activations(dictionary, widths):
    """The target holds the source's directions carried by a matrix that nobody is told, in another
    order; without activations there is nothing to carry them with."""
    generator = torch.Generator().manual_seed(3)
    first = torch.nn.functional.normalize(rows(64, d=widths[0]), dim=1)
    through = torch.randn(*widths, generator=generator)
    order = torch.randperm(64, generator=generator)
    a, b = named_site(0, "stem"), named_site(1, "head")
    saes = {a: dictionary(first), b: dictionary((first @ through)[order])}
    active = torch.rand(4000, 64, generator=generator) * (
        torch.rand(4000, 64, generator=generator) < 0.04
    )
    x = active @ first
    held_out = {a: [x], b: [x @ through + 0.01 * rows(4000, d=widths[1])]}
    links = link_dictionaries(saes, options=QUICK, held_out=lambda site: held_out[site])
    best = links.edges[links.edges["rank"] == 0]
    assert (best["source_latent"] == order.numpy()[best["target_latent"]]).all()
    assert best["cosine"].min() > 0.99
    with pytest.raises(UserError, match="through held-out activations"):
        link_dictionaries(saes, options=QUICK)
