"""SAELens' own training step, timed. Runs in SAELens' environment; options and output are in
timing.py.

The step is `SAETrainer.step`: forward with its auxiliary loss, backward, gradient clipping, Adam,
schedulers and firing statistics, as `SAETrainer.fit` calls it, without its progress bar and
logging. Decoder and L1 options are SAELens' defaults; its auxiliary loss is on with coefficient
--aux-coefficient.
"""

from __future__ import annotations

import torch
from sae_lens import __version__
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from timing import read_task, run


def main() -> None:
    task = read_task(("topk", "batchtopk"))
    sae_class, config_class = get_sae_training_class(task.architecture)
    options = {
        "architecture": task.architecture,
        "d_in": task.d,
        "d_sae": task.n_latents,
        "k": task.k if task.architecture == "topk" else float(task.k),
        "aux_loss_coefficient": task.aux_coefficient,
        "device": task.device,
    }
    sae = sae_class(config_class.from_dict(options))
    settings = SAETrainerConfig(
        total_training_samples=task.steps * task.batch_size,
        train_batch_size_samples=task.batch_size,
        lr=task.learning_rate,
        lr_end=task.learning_rate / 10,
        lr_warm_up_steps=task.lr_warmup_steps,
        lr_decay_steps=task.lr_decay_steps,
        device=task.device,
        dead_feature_window=30,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=task.batches())

    def step(index: int, batch: torch.Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    def reconstruct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if task.architecture == "topk":
            latents = sae.encode(rows)
            return latents, sae.decode(latents)
        return with_threshold(sae, rows)

    run(task, step, reconstruct, sae.save_inference_model, peer="saelens", version=__version__)


def with_threshold(sae: torch.nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """BatchTopK as SAELens exports it for inference: a fixed threshold instead of a choice within
    the batch."""
    _, pre = sae.encode_with_hidden_pre(rows)
    latents = pre.relu() * (pre > sae.topk_threshold)
    return latents, sae.decode(latents)


if __name__ == "__main__":
    main()
