"""What a stage's recipe is in the words of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.search.pruned import has_bfloat16

log = logging.getLogger(__name__)


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
        dataloader_pin_memory=torch.cuda.is_available(),
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


def micro_batches(recipe: StageRecipe, devices: int) -> tuple[int, int]:
    """Samples that a device holds at a time, and how many times it does so for a step.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    each = recipe.micro_batch or recipe.batch // devices
    if each == 0 or recipe.batch % (each * devices):
        raise ConfigError(
            f"a batch of {recipe.batch} cannot be shared out to {devices} devices that take "
            f"{recipe.micro_batch or 'all of their share'} at a time: set micro_batch so that "
            "batch = micro_batch x devices x a whole number"
        )
    return each, recipe.batch // (each * devices)


def checkpointing() -> dict[str, Any]:
    """The trainer's arguments that turn on gradient checkpointing, under their present names."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def checkpointing_on(model: Any) -> None:
    """Turn on gradient checkpointing as the trainer does."""
    name = next(iter(checkpointing()))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def warn_of_slow_bf16() -> None:
    """Say so where bfloat16 products will run on a processor that does not have them.

    Measured on an AMD EPYC without them, SmolLM2-135M forward and backward: 32 times float32's time
    (127 s a step in place of 4 s; one run).
    """
    if not torch.cuda.is_available() and not has_bfloat16():
        log.warning(
            "bf16 on a processor that does not multiply bfloat16 itself: a step can take 30 times "
            "as long as with bf16=false"
        )


def hold_in_bf16(model: nn.Module) -> None:
    """Frozen weights to bfloat16, trained ones to float32, where the optimiser keeps its precision.

    Codebooks stay in float32, frozen or not: rounding them would change codes and verdicts. So do
    batch normalisations, whose statistics are not parameters and stay in float32 too.
    """
    kept = {id(p) for p in getattr(model, "vqguard", nn.Module()).parameters()}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kept |= {id(p) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
            parameter.data = parameter.data.to(wanted)
