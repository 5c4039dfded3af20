"""How a stage holds a model while it trains, and how it shares out a batch.

Without the trainer and its imports, which take seconds: a plan needs the same and trains nothing.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.search.plan import has_bfloat16

log = logging.getLogger(__name__)

Stage = TypeVar("Stage", bound=StageRecipe)

_WORTH_HALVES = 16
"""Samples of a step; halves of fewer are too small for a processor's matrix products."""


def in_halves(recipe: Stage) -> Stage:
    """The recipe of a stage whose samples may come in any order, as a processor takes it.

    A step that is taken in two halves of like lengths has half the padding, and is the same but for
    rounding (docs/decisions, 0195). A recipe that says how many a device holds stays as it is.
    """
    if recipe.micro_batch is not None or recipe.batch < _WORTH_HALVES or recipe.batch % 2:
        return recipe
    return replace(recipe, micro_batch=recipe.batch // 2)


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


def checkpointing_on(model: Any) -> None:
    """Turn on gradient checkpointing as the trainer does."""
    name = "activation_checkpointing"
    name = name if hasattr(model, f"{name}_enable") else "gradient_checkpointing"
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


def vision_at_rest(model: nn.Module, adapter: Adapter) -> None:
    """Put the frozen vision encoder into eval mode.

    No dropout, and batch normalisation by its own statistics, which training mode would move and
    replace by the batch's.
    """
    for module in adapter.vision_modules(model):
        module.eval()
