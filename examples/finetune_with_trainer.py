"""Fine-tune a guarded model with transformers.Trainer, be stopped, and go on.

`GuardedCheckpoints` makes Trainer's whole-model checkpoints restore the guard as well.

    python examples/finetune_with_trainer.py [FOLDER]
    accelerate launch --cpu --num_processes 1 examples/finetune_with_trainer.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from vqguard import build_guard, guard_model, load_guarded
from vqguard.adapters import GuardedCheckpoints
from vqguard.recipes.data.encoding import Collator, EncodedSamples
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld


class GuardedTrainer(GuardedCheckpoints, Trainer):
    """Trainer whose checkpoints hold and restore the guard."""


class Inputs(Collator):
    """A batch without the captions, which only the retrofit's stage 1 uses."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        return {name: value for name, value in batch.items() if not name.startswith("caption")}


def trainer(folder: Path) -> GuardedTrainer:
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=64, semantic_codes=8), processor)
    model.vqguard.requires_grad_(False)
    samples = TinyWorld(seed=3).instructions(64)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-4,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # the guard's codebooks take no gradient
    )
    return GuardedTrainer(
        model=model,
        args=arguments,
        train_dataset=EncodedSamples(samples, processor, 256),
        data_collator=Inputs(processor.tokenizer.pad_token_id),
    )


def main(folder: Path) -> None:
    first = trainer(folder)
    first.train()
    checkpoint = str(folder / "checkpoint-2")
    second = trainer(folder)
    second.train(resume_from_checkpoint=checkpoint)
    if first.is_world_process_zero():
        one: Any = first.accelerator.unwrap_model(first.model)
        two: Any = second.accelerator.unwrap_model(second.model)
        expected = one.state_dict()
        worst = max(
            float((tensor.double() - expected[name].double()).abs().max())
            for name, tensor in two.state_dict().items()
        )
        same = one.vqguard.checksum("patch") == load_guarded(checkpoint).vqguard.checksum("patch")
        print(f"processes: {first.args.world_size}")
        print(f"the guard is in the checkpoint: {same}")
        print(f"largest difference to the uninterrupted run: {worst:.1e}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
