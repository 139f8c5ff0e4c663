"""dictionary_learning's own training step, timed. Runs in its environment; options and output are
in timing.py.

The step is the trainer's `update`: auxiliary loss, backward, projection, clipping, Adam, scheduler,
decoder norms. Rows have mean square norm 1, as its training script scales them. Its dead-latent
window is 10 million tokens; here it is 30 batches, as for the others, so that the auxiliary loss
takes part in short runs too.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from timing import read_task, run

TRAINERS = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}
DEAD_AFTER_BATCHES = 30


def main() -> None:
    task = read_task(tuple(TRAINERS), row_norm_one=True)
    trainer = TRAINERS[task.architecture](
        steps=task.steps,
        activation_dim=task.d,
        dict_size=task.n_latents,
        k=task.k,
        layer=0,
        lm_name="stored activations",
        lr=task.learning_rate,
        auxk_alpha=task.aux_coefficient,
        warmup_steps=task.lr_warmup_steps,
        decay_start=task.steps - task.lr_decay_steps,
        threshold_start_step=task.steps // 2,
        seed=task.seed,
        device=task.device,
    )
    trainer.dead_feature_threshold = DEAD_AFTER_BATCHES * task.batch_size

    def reconstruct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = trainer.ae.encode(rows)
        return latents, trainer.ae.decode(latents)

    def save(folder: Path) -> None:
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        config = {
            "trainer": {"dict_class": type(trainer.ae).__name__, "activation_dim": task.d},
            "buffer": {},
        }
        (folder / "config.json").write_text(json.dumps(config))

    run(
        task,
        trainer.update,
        reconstruct,
        save,
        peer="dictionary_learning",
        version=version("dictionary-learning"),
    )


if __name__ == "__main__":
    main()
