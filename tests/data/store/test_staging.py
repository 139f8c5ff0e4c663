"""Gathering rows into batches: the right rows in every dtype, in pieces, by a thread that keeps its
work to itself."""

import threading

import numpy as np
import pytest
import torch

import data.store.staging as staging
from data.store.layout import SiteLayout
from data.store.staging import StagingBuffers, keep_to_one_thread


@pytest.mark.parametrize("piece_numbers", [1, 7 * 12, 1 << 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gathered_rows_are_the_rows_at_the_slots_widened(monkeypatch, dtype, piece_numbers):
    monkeypatch.setattr(staging, "_PIECE_NUMBERS", piece_numbers)
    rows = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    window = rows.view(torch.uint16).numpy() if dtype == "bfloat16" else rows.numpy()
    buffers = StagingBuffers(
        [SiteLayout(name="site", width=12)], dtype, 20, torch.device("cpu"), ring=2
    )
    slots = np.random.default_rng(0).permutation(50)[:20]
    staged = buffers.begin()
    buffers.gather(staged, [window], slots[:13], at=0)
    buffers.gather(staged, [window], slots[13:], at=13)
    [values] = buffers.delivered(staged)
    assert torch.equal(values, rows[torch.from_numpy(slots)].to(torch.float32))


def test_a_reading_thread_keeps_torch_to_itself_and_leaves_the_others_theirs():
    before, seen = torch.get_num_threads(), {}

    def read() -> None:
        keep_to_one_thread()
        seen["reading"] = torch.get_num_threads()
        other = threading.Thread(target=lambda: seen.update(other=torch.get_num_threads()))
        other.start()
        other.join()

    try:
        torch.set_num_threads(3)
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
        assert seen == {"reading": 1, "other": 3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
