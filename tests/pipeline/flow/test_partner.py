"""A link means this partner: what is left of a target's sources when the partner is gone does not
pass for it."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from scipy.stats import binom
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


def clusters_with_tokens(*, carried, shared, together, k, seed, n_families=48, width=128):
    """Two layers of clustered features, read so badly that siblings are active together; only some
    features are carried, the others of the source are active on tokens of their own."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    n, n_tokens = n_families * SIZE, 6000

    def own():
        return normalize(torch.randn(n, width, generator=generator), dim=1)

    centres = own()[:n_families].repeat_interleave(SIZE, 0)
    base, there = own(), rng.random(n) < carried
    parts = torch.where(torch.tensor(there)[:, None], base + 0.3 * own(), own()), base + 0.3 * own()
    families = rng.random((n_tokens, n_families, 1)) < 0.08
    drawn = [rng.random((n_tokens, n_families, SIZE)) < together / SIZE for _ in range(2)]
    after = (families & drawn[0]).reshape(n_tokens, n)
    before = np.where(there, after, (families & drawn[1]).reshape(n_tokens, n))
    size = np.abs(rng.normal(1, 0.3, (n_tokens, n)))
    saes, rows = {}, {}
    for site, part, on in zip((BEFORE, AFTER), parts, (before, after), strict=True):
        D = normalize(shared**0.5 * centres + (1 - shared) ** 0.5 * normalize(part, dim=1), dim=1)
        mixed = 0.5 * D.T @ D * width / n + 0.5 * torch.eye(width)
        read = D @ torch.linalg.inv(mixed)
        saes[site] = Sae(**{**vars(sae(D, read)), "activation": TopKActivation(k=k)})
        rows[site] = torch.tensor(on * size, dtype=torch.float32) @ D
    return saes, rows, there


@pytest.mark.parametrize(
    ("shared", "together", "k"), [(0.3, 2, 16), (0.6, 2, 16), (0.5, 6, 32), (0.8, 4, 32)]
)
@pytest.mark.parametrize("carried", [0.1, 0.5])
def test_clusters_that_are_active_together_keep_the_rate(carried, shared, together, k):
    for fdr in (0.05, 0.1):
        n_false = n_kept = 0
        for seed in range(2):
            saes, rows, there = clusters_with_tokens(
                carried=carried, shared=shared, together=together, k=k, seed=seed
            )
            options = LinkOptions(top_k=1, thresholds=Calibrated(fdr=fdr))
            links = link_dictionaries(
                saes, options=options, held_out=lambda site, rows=rows: [rows[site]]
            ).edges
            best = links[(links["rank"] == 0) & links["kept"]]
            target = best["target_latent"].to_numpy()
            right = (best["source_latent"].to_numpy() == target) & there[target]
            assert right.sum() >= 0.9 * there.sum()
            n_false, n_kept = n_false + (~right).sum(), n_kept + len(best)
        # at most 1.2 times the rate, as far as this many links can tell
        assert n_false <= binom.ppf(0.99, n_kept, 1.2 * fdr)


def test_values_that_exclude_each_other_are_linked_by_reading_and_activity():
    """Each direction is made of those of the other values, which stand in for it by reading."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    n_variables, n_values = 16, 5
    values = torch.randn(n_variables, n_values, 64, generator=generator)
    directions = normalize(values - values.mean(1, keepdim=True), dim=2).flatten(0, 1)
    drawn = rng.integers(n_values, size=(4000, n_variables))
    rows = torch.from_numpy(np.eye(n_values, dtype=np.float32)[drawn]).flatten(1) @ directions
    saes = {}
    for site in (BEFORE, AFTER):
        noise = normalize(torch.randn(directions.shape, generator=generator), dim=1)
        whole = sae(directions + 0.4 * noise, torch.linalg.pinv(directions + 0.4 * noise).T)
        saes[site] = Sae(**{**vars(whole), "activation": TopKActivation(k=n_variables)})
    kept = {}
    for held_out in (None, lambda site: [rows]):
        links = link_dictionaries(saes, options=LinkOptions(top_k=1), held_out=held_out).edges
        best = links[(links["rank"] == 0) & links["kept"]]
        assert (best["source_latent"] == best["target_latent"]).all()
        kept[held_out is None] = len(best) / len(directions)
    assert kept[False] >= 0.9
    assert kept[True] <= 0.8, "by directions alone"


def test_a_source_counts_by_activity_for_the_target_that_it_shares_most_with():
    """Every source has a partner and an orphan that is near it and active on some of its tokens."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(32, WIDTH, generator=generator), dim=1)
    aside = normalize(torch.randn(32, WIDTH, generator=generator), dim=1)
    source = directions_of(rows, name="source")
    target = directions_of(torch.cat([rows, rows + 0.5 * aside]), name="target")
    on = rng.random((2000, 32)) < 0.1
    orphans = on & (rng.random(on.shape) < 0.7)
    codes = tuple(
        codes_from(sparse.csr_matrix(np.asarray(part, np.float32)))
        for part in (on, np.concatenate([on, orphans], axis=1))
    )
    edges = edges_of(match(source, target, k=2), top_k=1)
    (by_reading, _), (shared, _) = stand_ins(source, target, codes, edges)
    partner, orphan = edges.top & (edges.target < 32), edges.top & (edges.target >= 32)
    assert (edges.source == edges.target % 32)[edges.top].all()
    assert by_reading[orphan].min() > 0.6, "by reading alone both count"
    assert shared[partner].min() > 0.9
    assert shared[orphan].max() == 0
