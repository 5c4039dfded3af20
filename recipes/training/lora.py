"""Low-rank adapters in the language model of stage 2, by PEFT, inside the guarded model.

They are injected, not wrapped around: the model keeps its class, its guard and the names by which
its adapter finds its parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.errors import ConfigError
from vqguard.recipes.recipe import LoraRecipe

_SEED = 0
"""Of the updates' random halves. The other halves start at zero, so nothing is changed yet."""


def lora_targets(model: nn.Module, adapter: Adapter, recipe: LoraRecipe) -> list[str]:
    """Full names of the linear layers that get an update.

    Raises:
        ConfigError: the language model has no such layer.
    """
    head: Any = model
    head = head.get_output_embeddings()
    language = adapter.language_model(model)
    inside = {id(module) for module in language.modules()} - {id(head)}
    linear = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear)
    ]
    last = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [target for target in recipe.targets if target not in last]
    if unknown or not linear:
        raise ConfigError(
            f"lora.targets: {', '.join(unknown) or 'no linear layer'} is not in "
            f"{type(language).__name__}; its linear layers are {', '.join(last) or 'none'}"
        )
    return [n for n in linear if not recipe.targets or n.rpartition(".")[2] in recipe.targets]


def add_lora(
    model: nn.Module, adapter: Adapter, recipe: LoraRecipe
) -> list[tuple[str, nn.Parameter]]:
    """Inject the adapters and return their parameters by name. Works on the meta device too.

    Raises:
        ConfigError: a target that the language model does not have.
    """
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=lora_targets(model, adapter, recipe),
        bias="none",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    # A resumed run must not depend on what was drawn before it.
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEED)
        empty = next(model.parameters()).device.type == "meta"
        inject_adapter_in_model(config, model, low_cpu_mem_usage=empty)
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name]


def merge_lora(model: nn.Module) -> None:
    """Add every update to its weight and take the adapters out: the layers are what they were."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        merged: Any = layer
        merged.merge()
        model.set_submodule(name, merged.get_base_layer())
    config: Any = model
    if hasattr(config, "peft_config"):
        del config.peft_config


def save_lora(model: nn.Module, recipe: LoraRecipe, folder: Path) -> None:
    """Write the adapters alone, as PEFT reads them: `adapter_config.json` and safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    save_file(
        {f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in state.items()},
        folder / "adapter_model.safetensors",
    )
    targets = sorted(n for n, m in model.named_modules() if isinstance(m, LoraLayer))
    adapters: Any = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        bias="none",
        inference_mode=True,
    )
    config = adapters.to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    text = json.dumps(plain, indent=2, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
