"""Statistics measured again from the rows: the same bits here and on workers, and those gathered
while writing."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import LocalCluster

from data.store import ActivationStore, StoreWriter
from data.store.checks import recount_store
from data.store.shards import write_chunk_file
from pipeline.cli.store import store_commands
from pipeline.context import RunContext
from tests.data.store.made import (
    MLP,
    RESIDUAL,
    fill_shards,
    make_store,
    planted_layout,
    planted_rows,
    planted_tokens,
)


def same(a, b) -> bool:
    fields = (
        "n",
        "mean",
        "variance",
        "n_non_finite",
        "median_norm",
        "norm_quantiles",
        "norm_histogram",
    )
    return all(
        np.array_equal(np.asarray(getattr(a, f)), np.asarray(getattr(b, f))) for f in fields[:5]
    ) and (
        a.norm_quantiles == b.norm_quantiles and np.array_equal(a.norm_histogram, b.norm_histogram)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_recount_gives_the_bits_that_were_gathered_while_writing(tmp_path, dtype):
    store = make_store(tmp_path / "store.zarr", planted_rows(), dtype=dtype)
    found = recount_store(store.url, RunContext())
    assert found.problems == ()
    assert all(same(found.statistics[name], store.statistics(name)) for name in store.names)


def test_a_recount_is_the_mean_and_variance_of_the_ordinary_rows(tmp_path):
    store = make_store(tmp_path / "store.zarr", planted_rows())
    rows = store.read(RESIDUAL, 0, store.n_rows)[store.tokens().flags == 0].astype(np.float64)
    found = recount_store(store.url, RunContext()).statistics[RESIDUAL]
    assert found.n == len(rows)
    assert np.allclose(found.mean, rows.mean(axis=0), rtol=1e-5, atol=1e-5)
    assert np.allclose(found.variance, rows.var(axis=0), rtol=1e-4)


def test_rows_that_are_not_finite_are_counted_again(tmp_path):
    rows = planted_rows()
    rows[MLP][300, 2] = float("inf")
    rows[MLP][4801, :3] = float("nan")
    writer = StoreWriter.create(
        tmp_path / "store.zarr", planted_layout(rows), allow_non_finite=True
    )
    fill_shards(writer, rows, planted_tokens(5000))
    writer.finish()
    found = recount_store(tmp_path / "store.zarr", RunContext())
    assert found.problems == ()
    assert found.statistics[MLP].n_non_finite == 4


def test_statistics_that_are_not_those_of_the_rows_are_named(tmp_path):
    """A sound file with its own checksum, but another mean in it: only measuring again can tell."""
    store = make_store(tmp_path / "store.zarr", planted_rows())
    array = store.layout.moments_array(store.site_layout(MLP))
    wrong = np.ones((1, 2, store.width(MLP)))
    write_chunk_file(store.place, array, 1, wrong)
    [problem] = recount_store(store.url, RunContext()).problems
    assert problem.where == MLP
    assert "mean" in problem.what
    assert "norms" not in problem.what
    result = CliRunner().invoke(store_commands, ["statistics", store.url, "--quiet"])
    assert result.exit_code == 2


@pytest.mark.slow
def test_workers_recount_to_the_same_bits_as_one_process(tmp_path):
    store = make_store(tmp_path / "store.zarr", planted_rows())
    here = recount_store(store.url, RunContext())
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        there = recount_store(store.url, RunContext(scheduler=cluster.scheduler_address))
        command = [
            "statistics",
            store.url,
            "--scheduler",
            cluster.scheduler_address,
            "--json",
            "--quiet",
        ]
        result = CliRunner().invoke(store_commands, command)
    assert there.problems == ()
    assert all(same(there.statistics[name], here.statistics[name]) for name in store.names)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["as_gathered"]
    assert [each["n"] for each in told["sites"]] == [
        ActivationStore.open(store.url).statistics(MLP).n
    ] * 2
