"""The one-pass survey finds what a loop over every activation finds, in whatever chunks it is given
the rows."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.describe import counts as counts_module
from pipeline.describe import survey as survey_module
from pipeline.describe.corpus import Corpus
from pipeline.describe.encoder import Encoder
from pipeline.describe.examples import PROFILES, choose_examples, deciles_of
from pipeline.describe.survey import Survey, SurveyOptions, add_rows, survey_site
from tests.pipeline.describe.oracle import (
    N_LATENTS,
    slow_survey,
    slow_top,
    small_activations,
    small_corpus,
    small_dictionary,
    surrounding,
    threshold_dictionary,
)

OPTIONS = SurveyOptions(n_top=5, n_near=3, n_uniform=16, cofiring_rows=10**9)


@pytest.fixture(scope="module", params=["top-k", "threshold"])
def case(request):
    corpus = small_corpus()
    sae = small_dictionary() if request.param == "top-k" else threshold_dictionary()
    x = small_activations(corpus)
    return corpus, sae, x, slow_survey(x, sae, corpus), run(corpus, sae, x)


def run(corpus, sae, x, options=OPTIONS) -> Survey:
    return survey_site(lambda a, b: x[a:b], Encoder.of(sae, "float32"), corpus, options)


def test_counts_moments_and_largest_match_the_loop(case):
    _, _, _, slow, survey = case
    for latent in range(N_LATENTS):
        values = np.array([a for a, _ in slow.values[latent]])
        assert survey.count[latent] == len(values)
        assert survey.total[latent] == pytest.approx(values.sum())
        assert survey.squares[latent] == pytest.approx((values**2).sum())
        assert survey.largest[latent] == pytest.approx(values.max(initial=0))
    assert survey.n_rows == case[0].n_kept


def test_top_examples_are_the_strongest_of_each_document_without_repeated_text(case):
    corpus, _, _, slow, survey = case
    for latent in range(N_LATENTS):
        rows = survey.top.row[latent][survey.top.filled[latent]]
        assert rows.tolist() == slow_top(slow, corpus, latent, OPTIONS.n_top)


def test_every_attribute_is_counted_apart_on_the_three_parts_of_the_documents(case):
    corpus, _, _, slow, survey = case
    for name, table in survey.tables(corpus).items():
        names = ("n_propose", "n_choose", "n_held", "mass_rest", "mass_held")
        activations = np.stack([table.column(c) for c in names], axis=1)
        found = {
            (int(f), int(v)): row
            for f, v, row in zip(table.latent, table.value, activations, strict=True)
            if row.any()
        }
        expected = {
            (f, v): pair for (attribute, f, v), pair in slow.pairs.items() if attribute == name
        }
        assert found.keys() == expected.keys()
        for pair, numbers in expected.items():
            assert found[pair] == pytest.approx(numbers)


def test_the_histogram_holds_every_activation_in_the_bin_of_its_size(case):
    _, _, _, slow, survey = case
    for latent in range(N_LATENTS):
        expected = np.zeros(survey_module.N_BINS, dtype=int)
        for a, _ in slow.values[latent]:
            expected[int((np.log2(a) + 16) * 4 // 1)] += 1
        assert survey.histogram[latent].tolist() == expected.tolist()


def test_near_misses_are_just_below_what_being_active_takes_and_never_active(case):
    _, sae, _, slow, survey = case
    assert survey.near.filled.any()
    for latent, place in zip(*np.nonzero(survey.near.filled), strict=True):
        row = survey.near.row[latent, place]
        assert slow.z[row, latent] == 0
        assert survey.near.value[latent, place] == pytest.approx(slow.pre[row, latent], rel=1e-5)
        active = slow.z[row][slow.z[row] > 0]
        edge = active.min() if sae.activation.kind == "topk" else 0.8
        assert survey.near.gap[latent, place] == pytest.approx(
            (edge - slow.pre[row, latent]) / edge, abs=1e-5
        )


def test_activity_around_an_example_is_what_the_dictionary_does_there_and_stays_in_its_run(case):
    corpus, _, _, slow, survey = case
    reach = survey_module.REACH
    for selection in (survey.top, survey.uniform, survey.near):
        for latent, place in zip(*np.nonzero(selection.filled), strict=True):
            row = int(selection.row[latent, place])
            around = selection.around[latent, place].astype(float) * selection.value[latent, place]
            for offset in range(-reach, reach + 1):
                other = row + offset
                inside = (
                    0 <= other < len(corpus)
                    and corpus.run[other] == corpus.run[row]
                    and corpus.kept[other]
                )
                expected = slow.z[other, latent] if inside else 0.0
                assert around[offset + reach] == pytest.approx(expected, rel=2e-3, abs=1e-4)


def test_coactive_counts_the_tokens_on_which_two_latents_of_the_whole_dictionary_are_active(case):
    corpus, _, _, slow, survey = case
    is_active = (slow.z[corpus.kept] > 0).astype(float)
    assert np.array_equal(survey.cofiring.toarray(), is_active.T @ is_active)


@pytest.mark.parametrize("chunk_rows", [20, 60, 140])
def test_chunks_do_not_matter(case, chunk_rows, monkeypatch):
    corpus, sae, x, _, whole = case
    monkeypatch.setattr(survey_module, "CHUNK_ROWS", chunk_rows)
    assert_same(run(corpus, sae, x), whole, corpus)


@pytest.mark.parametrize("dense", [0, 1 << 21])
def test_ranges_of_latents_and_the_way_of_counting_do_not_matter(case, dense, monkeypatch):
    corpus, sae, x, _, whole = case
    monkeypatch.setattr(counts_module, "_AT_ONCE", 40)
    monkeypatch.setattr(counts_module, "_DENSE", dense)
    monkeypatch.setattr(survey_module, "COUNTED_AT_ONCE", 500)
    assert_same(run(corpus, sae, x), whole, corpus)


def test_surveys_of_two_halves_merge_to_the_survey_of_all(case):
    corpus, sae, x, _, whole = case
    cut = int(corpus.run_start[17])
    parts = []
    for start, stop in ((0, cut), (cut, len(corpus))):
        part = Survey.empty(sae.n_latents, corpus, OPTIONS, whole.strong)
        add_rows(part, lambda a, b: x[a:b], Encoder.of(sae, "float32"), corpus, start, stop)
        parts.append(part)
    assert_same(parts[0].merge(parts[1], corpus), whole, corpus)
    assert_same(parts[1].merge(parts[0], corpus), whole, corpus)


def assert_same(a: Survey, b: Survey, corpus: Corpus) -> None:
    for name in ("count", "n_documents", "histogram", "cofiring_count", "largest", "n_rows"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.allclose(a.total, b.total)
    assert np.array_equal(a.cofiring.toarray(), b.cofiring.toarray())
    for name in ("top", "near", "uniform"):
        for field in ("row", "key", "value", "around"):
            assert np.array_equal(
                getattr(getattr(a, name), field), getattr(getattr(b, name), field)
            ), (name, field)
    for name, table in a.tables(corpus).items():
        other = b.tables(corpus)[name]
        assert np.array_equal(table.key, other.key)
        assert all(np.allclose(x, y) for x, y in zip(table.columns, other.columns, strict=True))


def test_the_uniform_sample_is_uniform_over_activations():
    """Every activation of the busiest latents is drawn about equally often, whatever its size or
    place."""
    corpus = small_corpus()
    sae, x = small_dictionary(), small_activations(corpus)
    latent = int(np.argmax(run(corpus, sae, x).count))
    drawn: dict[int, int] = {}
    n_seeds = 120
    for seed in range(n_seeds):
        survey = run(
            corpus,
            sae,
            x,
            SurveyOptions(n_top=1, n_near=1, n_uniform=16, cofiring_rows=0, seed=seed),
        )
        for row in survey.uniform.row[latent]:
            drawn[int(row)] = drawn.get(int(row), 0) + 1
    n = int(survey.count[latent])
    share = 16 / n
    assert n > 32
    counts = np.array([drawn.get(row, 0) for row in drawn])
    chi_square = ((counts - n_seeds * share) ** 2 / (n_seeds * share * (1 - share))).sum()
    assert len(drawn) == n
    assert chi_square < n + 5 * np.sqrt(2 * n)


def test_deciles_are_quantiles_of_the_activations_never_of_zeros(case):
    """The trap of equal-width intervals from 0 to the maximum, whose lowest one is full of
    zeros."""
    corpus, sae, x, slow, survey = case
    exact = run(corpus, sae, x, SurveyOptions(n_top=1, n_near=1, n_uniform=10**3, cofiring_rows=0))
    for latent in range(N_LATENTS):
        values = [a for a, _ in slow.values[latent]]
        if not values:
            assert np.isnan(deciles_of(exact)[latent]).all()
            continue
        expected = np.quantile(values, np.linspace(0, 1, 11))
        assert deciles_of(exact)[latent] == pytest.approx(expected, rel=1e-5)
        if len(values) > 40:
            assert deciles_of(survey)[latent][1:] == pytest.approx(expected[1:], rel=0.12)


def test_every_example_of_a_decile_is_an_activation_of_that_decile(case):
    _, _, _, slow, survey = case
    deciles = deciles_of(survey)
    examples = choose_examples(survey, deciles, PROFILES["standard"])
    latent_of = np.repeat(np.arange(N_LATENTS), np.diff(examples.offset))
    shown = examples.tab == 1
    assert shown.sum() > N_LATENTS
    for e in np.flatnonzero(shown):
        latent, d = latent_of[e], examples.decile[e]
        assert slow.z[examples.row[e], latent] > 0
        low = deciles[latent, d] if d else 0
        assert low <= examples.value[e]
        assert examples.value[e] < deciles[latent, d + 1] or d == 9


def test_a_latent_that_is_never_active_has_no_examples_and_no_numbers(case):
    _, _, _, _, survey = case
    assert survey.count[-1] == 0
    examples = choose_examples(survey, deciles_of(survey), PROFILES["standard"])
    assert examples.offset[-1] == examples.offset[-2]


def test_repeated_text_gives_one_top_example(case):
    corpus, _, _, slow, survey = case
    repeated = 0
    for latent in range(N_LATENTS):
        texts = [surrounding(corpus, int(r)) for r in survey.top.row[latent] if r >= 0]
        assert len(set(texts)) == len(texts)
        repeated += len({int(corpus.document[r]) for _, r in slow.values[latent]}) > len(texts)
    assert repeated


def test_text_is_dropped_that_filters_leave_out(case):
    corpus, _, _, _, survey = case
    assert not corpus.kept.all()
    for selection in (survey.top, survey.uniform, survey.near):
        assert corpus.kept[selection.row[selection.filled]].all()
