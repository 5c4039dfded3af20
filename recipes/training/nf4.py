"""Frozen linear layers in 4 bits while a stage trains what stands beside them.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): weights are kept as NF4 with double quantisation,
and multiplied out for each product. bitsandbytes does it, on a GPU and on a processor. Only the
stage sees 4 bits: the whole layers wait on the CPU, and come back with the updates of low-rank
adapters added. So nothing of it is in a file, and what is guarded, calibrated and measured is the
whole model with its updates, as it is served.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.errors import ConfigError
from vqguard.recipes.placement import is_spread
from vqguard.recipes.processes import device
from vqguard.recipes.recipe import LoraRecipe, StageRecipe
from vqguard.recipes.training.lora import lora_targets

BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight: 4 bits, 8 bits of scale for each 64 weights, and 32 bits of the scales' own scale
for each 256 of them (the paper, section 3)."""
MARK = "is_loaded_in_4bit"
"""By this attribute PEFT knows that it stands beside layers of 4 bits."""


def frozen_linear(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the layers that can be held so: all linear ones of the language model but its head.

    The head gives the answers' probabilities, and is often the embedding as well.
    """
    return lora_targets(model, adapter, LoraRecipe())


def require_bitsandbytes() -> None:
    """Raise `ConfigError` where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("nf4 needs bitsandbytes: pip install 'vqguard[qlora]'")


def hold_in_4_bits(model: Any, adapter: Adapter, recipe: StageRecipe) -> dict[str, nn.Linear]:
    """Put a layer of 4 bits in the place of each, and return the whole ones, by name, on the CPU.

    Raises:
        ConfigError: bitsandbytes is not there.
    """
    require_bitsandbytes()
    # keeps bitsandbytes, an optional package, out of start-up
    layers: Any = importlib.import_module("bitsandbytes.nn")

    whole: dict[str, nn.Linear] = {}
    for name in frozen_linear(model, adapter):
        layer: Any = model.get_submodule(name)
        with torch.device("meta"):
            packed = layers.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            )
        kind = {"quant_type": "nf4", "compress_statistics": True}
        packed.weight = layers.Params4bit(layer.weight.data, requires_grad=False, **kind)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
        packed.to(layer.weight.device if is_spread(model) else device())
        model.set_submodule(name, packed)
        whole[name] = layer.to("cpu")
    setattr(model, MARK, True)
    return whole


def take_back(model: Any, whole: dict[str, nn.Linear]) -> None:
    """Put the whole layers back, with what low-rank adapters have learnt beside them added."""
    for name, layer in whole.items():
        held = model.get_submodule(name)
        weight, where = layer.weight, held.weight.device
        for adapter in held.active_adapters if isinstance(held, LoraLayer) else ():
            update = held.get_delta_weight(adapter)
            weight.data = (weight.data.to(update) + update).to(weight.dtype)
        model.set_submodule(name, layer.to(where))
    if whole:
        delattr(model, MARK)
