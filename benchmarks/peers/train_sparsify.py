"""sparsify's training step, timed. Runs in sparsify's environment; options and output are in
timing.py.

sparsify trains inside a forward hook of the language model. Here the same calls of its
`SparseCoder` are made on stored rows, in the order of `Trainer.fit` (decoder norms, batch variance,
forward, backward, removal of the parallel gradient, optimizer, scheduler, firing counts), with Adam
instead of its default SignSGD, so that losses can be compared. Triton kernels are left out where
there is no GPU, as its environment variable does. There is no BatchTopK in it.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

from importlib.metadata import version

from sparsify import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder
from timing import read_task, run
from transformers import get_linear_schedule_with_warmup

DEAD_AFTER_BATCHES = 30


def main() -> None:
    task = read_task(("topk",))
    torch.set_float32_matmul_precision("high")  # as Trainer.fit does
    coder = SparseCoder(
        task.d, SparseCoderConfig(num_latents=task.n_latents, k=task.k), device=task.device
    )
    optimizer = torch.optim.Adam(coder.parameters(), lr=task.learning_rate)
    scheduler = get_linear_schedule_with_warmup(optimizer, task.lr_warmup_steps, task.steps)
    silent = torch.zeros(task.n_latents, dtype=torch.long, device=task.device)
    fired = torch.zeros(task.n_latents, dtype=torch.bool, device=task.device)

    def step(index: int, batch: torch.Tensor) -> None:
        if index == 0:
            coder.b_dec.data = batch.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        dead = silent > DEAD_AFTER_BATCHES * task.batch_size if task.aux_coefficient > 0 else None
        variance = (batch - batch.mean(0)).pow(2).sum()
        out = coder(batch, batch, dead_mask=dead, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + task.aux_coefficient * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        silent.add_(len(batch))
        silent[fired] = 0
        fired.zero_()

    def reconstruct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices, _ = coder.encode(rows)
        latents = torch.zeros(len(rows), task.n_latents, device=rows.device).scatter_(
            1, indices, values
        )
        return latents, coder.decode(values, indices)

    run(
        task,
        step,
        reconstruct,
        coder.save_to_disk,
        peer="sparsify",
        version=version("eai-sparsify"),
    )


if __name__ == "__main__":
    main()
