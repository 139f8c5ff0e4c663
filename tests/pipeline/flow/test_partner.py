"""A link means this partner: what is left of a target's sources when the partner is gone does not
pass for it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from torch.nn.functional import normalize

from featureflow.sites import Site
from pipeline.flow.directions import directions_of
from pipeline.flow.edges import edges_of
from pipeline.flow.functional import codes_from
from pipeline.flow.link import link_dictionaries
from pipeline.flow.match import match
from pipeline.flow.options import Calibrated, LinkOptions
from pipeline.flow.partner import stand_ins
from sae import Sae, TopKActivation

N_FAMILIES, SIZE, WIDTH = 60, 8, 256
BEFORE, AFTER = Site(0, "resid_post"), Site(1, "resid_post")


def sae(directions, encoder) -> Sae:
    n, d = directions.shape
    return Sae(
        W_enc=encoder,
        b_enc=torch.zeros(n),
        W_dec=normalize(directions, dim=1),
        b_dec=torch.zeros(d),
        b_in=torch.zeros(d),
        activation=TopKActivation(k=8),
    )


def layer(centres, own, *, generator, noise=0.5):
    """Families of features that share four fifths of their direction; an encoder reads the own part
    alone."""
    blurred = own + noise * normalize(torch.randn(own.shape, generator=generator), dim=1)
    directions = 0.9 * centres.repeat_interleave(SIZE, 0) + 0.45 * normalize(blurred, dim=1)
    return sae(directions, normalize(blurred, dim=1))


@pytest.fixture
def families():
    """Two layers with the same features, and the encoders that tell siblings apart."""
    generator = torch.Generator().manual_seed(0)
    centres = normalize(torch.randn(N_FAMILIES, WIDTH, generator=generator), dim=1)
    own = normalize(torch.randn(N_FAMILIES * SIZE, WIDTH, generator=generator), dim=1)
    return tuple(layer(centres, own, generator=generator) for _ in range(2))


def kept(source: Sae, target: Sae):
    options = LinkOptions(top_k=1, thresholds=Calibrated(fdr=0.05))
    edges = link_dictionaries({BEFORE: source, AFTER: target}, options=options).edges
    return edges[(edges["rank"] == 0)].set_index("target_latent")


def only(whole: Sae, rows: np.ndarray) -> Sae:
    return sae(whole.W_dec[rows], whole.W_enc[rows])


def test_partners_are_kept_and_orphans_of_close_siblings_are_not(families):
    before, after = families
    there = np.random.default_rng(0).random(len(before.W_dec)) < 0.5
    links = kept(only(before, np.flatnonzero(there)), after)
    right = links["source_latent"].to_numpy() == np.cumsum(there)[links.index] - 1
    assert (links["kept"] & right)[there].mean() >= 0.9
    assert links["cosine"][~there].median() > 0.7, "siblings are near"
    assert links["kept"][~there].mean() <= 0.05


def test_a_target_that_two_sources_share_equally_has_no_one_partner(families):
    before, _ = families
    n = len(before.W_dec)
    pairs = torch.arange(n).roll(3 * SIZE)
    merged = sae(before.W_dec + before.W_dec[pairs], before.W_enc + before.W_enc[pairs])
    links = kept(before, merged)
    assert links["kept"].mean() <= 0.1
    assert links["related"].mean() >= 0.8, "something of them is there all the same"


def test_copies_of_the_partner_are_no_rivals(families):
    before, after = families
    both = sae(torch.cat([before.W_dec] * 3), torch.cat([before.W_enc] * 3))
    links = kept(both, after)
    right = links["source_latent"].to_numpy() % len(before.W_dec) == links.index
    assert (links["kept"] & right).mean() >= 0.9


def test_a_transcoders_encoder_reads_another_space_and_is_left_out(families):
    before, after = families
    noise = torch.randn(before.W_enc.shape, generator=torch.Generator().manual_seed(1))
    wrong = sae(before.W_dec, noise)
    stated = Sae(**{**vars(wrong), "metadata": {"reads": "blocks.0.hook_resid_mid"}})
    assert kept(stated, after)["kept"].mean() > kept(wrong, after)["kept"].mean() + 0.3


@pytest.mark.parametrize("together", [True, False])
def test_a_source_that_is_active_with_the_partner_is_no_rival(together):
    """Two latents that write half of a feature each, in directions of their own."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(64, WIDTH, generator=generator), dim=1)
    source = directions_of(rows, name="source")
    target = directions_of((rows[:32] + rows[32:]), name="target")
    on = rng.random((2000, 32)) < 0.05
    other = on if together else rng.random(on.shape) < 0.05
    codes = tuple(
        codes_from(sparse.csr_matrix(np.asarray(part, np.float32)))
        for part in (np.concatenate([on, other], axis=1), on)
    )
    edges = edges_of(match(source, target, k=2), top_k=1)
    _, (shared, rivals) = stand_ins(source, target, codes, edges)
    first = edges.top & (edges.source < 32)
    assert np.median(shared[first]) > 0.7
    by_reading = next(iter(stand_ins(source, target, None, edges)))[1]
    assert np.median(by_reading) > 0.5, "without tokens the second half is a rival"
    assert np.median(rivals) < 0.3
