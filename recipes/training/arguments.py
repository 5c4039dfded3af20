"""What a stage's recipe is in the words of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.step import micro_batches


def training_arguments(
    recipe: StageRecipe, folder: Path, *, seed: int, devices: int, steps: int
) -> TrainingArguments:
    """The arguments of one stage.

    Args:
        folder: where checkpoints go.
        seed: of dropout.
        devices: how many processes share a batch.
        steps: the steps of an epoch.

    Raises:
        ConfigError: the batch cannot be shared out evenly, the launcher asks for another
            precision than the recipe, or its processes would not know of each other.
    """
    each, times = micro_batches(recipe, devices)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", "bf16" if recipe.bf16 else "no"):
        raise ConfigError(
            f"the launcher's mixed_precision is {launcher!r}, but the recipe decides: set it to "
            "'no', and stage1.bf16 and stage2.bf16 as wanted"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=each,
        gradient_accumulation_steps=times,
        bf16=recipe.bf16,
        # Else bf16 insists on a GPU, and several processes would each train alone.
        use_cpu=(recipe.bf16 or devices > 1) and not torch.cuda.is_available(),
        **(checkpointing() if recipe.gradient_checkpointing else {}),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * math.ceil(recipe.epochs * steps)),
        weight_decay=recipe.weight_decay,
        save_strategy="steps",
        save_steps=recipe.checkpoint_every,
        save_total_limit=2,  # the older one is the fall-back while the newer is written
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        # A loss also reaches codebooks by what the guard recorded, and DDP looks for unused
        # parameters from the model's outputs alone.
        ddp_find_unused_parameters=False,
        # Each process counts the uses of its own samples; DDP would write the first one's over.
        ddp_broadcast_buffers=False,
        seed=seed,
        data_seed=seed,
    )
    if arguments.world_size != devices:
        raise ConfigError(
            f"{devices} processes were launched, but accelerate knows of {arguments.world_size}: "
            "each would train alone. Launch with torchrun or accelerate launch."
        )
    if devices == 1:
        # One process is one device: DataParallel's copies of a module would count for themselves.
        arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def checkpointing() -> dict[str, Any]:
    """The trainer's arguments that turn on gradient checkpointing, under their present names."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
