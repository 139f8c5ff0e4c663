"""A link means this partner: what is left of a target's sources when the partner is gone does not
pass for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from featureflow.sites import Site
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import Calibrated, LinkOptions
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


def values_of_variables(generator, *, n_variables=16, n_values=5, n_tokens=3000):
    """Activations that are sums of one value of each variable; the values of a variable have sum
    zero, so each direction is made of the others'. Also which value is there."""
    directions = torch.randn(n_variables, n_values, 96, generator=generator)
    directions = normalize(directions - directions.mean(1, keepdim=True), dim=2).flatten(0, 1)
    drawn = torch.randint(n_values, (n_tokens, n_variables), generator=generator)
    there = torch.zeros(n_tokens, n_variables, n_values).scatter_(2, drawn[:, :, None], 1.0)
    return directions, there.flatten(1)


def reader_of(directions, spread, generator=None) -> Sae:
    """One latent a value, or `spread`: two that are always active together and write half of the
    value each, in directions of their own."""
    read, k = torch.linalg.pinv(directions).T, 16
    if spread:
        aside = 0.9 * normalize(torch.randn(directions.shape, generator=generator), dim=1)
        directions = torch.cat([directions + aside, directions - aside])
        read, k = torch.cat([read, read]), 32
    return Sae(**{**vars(sae(directions, read)), "activation": TopKActivation(k=k)})


def test_latents_that_are_active_together_are_one_feature_whatever_their_directions():
    generator = torch.Generator().manual_seed(0)
    directions, there = values_of_variables(generator)
    n = len(directions)
    saes = {BEFORE: reader_of(directions, True, generator), AFTER: reader_of(directions, False)}
    rows = there @ directions
    options = LinkOptions(top_k=1)
    links = link_dictionaries(saes, options=options, held_out=lambda site: [rows]).edges
    best = links[links["rank"] == 0]
    right = best["source_latent"].to_numpy() % n == best["target_latent"].to_numpy()
    assert (best["kept"] & right).sum() >= 0.95 * n
    assert (best["kept"] & ~right).sum() <= 0.05 * n
