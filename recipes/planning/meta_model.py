"""The model of a recipe on the meta device: shapes without weights, and what each stage trains."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from vqguard.adapters import build_guard, get_adapter, resolve_model
from vqguard.adapters.base import Adapter
from vqguard.adapters.sizes.built import built_within, described
from vqguard.errors import ConfigError
from vqguard.recipes.public_sizes import public_config, public_configs
from vqguard.recipes.recipe import RetrofitRecipe, StageRecipe
from vqguard.recipes.training.lora import add_lora

PARTS = ("vision encoder", "projector", "codebooks", "language model", "low-rank adapters", "rest")


@dataclass(frozen=True)
class MetaModel:
    """A model that holds no numbers, with its guard as the submodule `vqguard`, not installed."""

    model: Any
    adapter: Adapter
    visual_tokens: int
    """Visual tokens of the largest image."""

    def counts(self, trained: set[str] | None = None) -> dict[str, int]:
        """Parameters by part; only those named in `trained`, if given."""
        parts = _parts(self.model, self.adapter)
        counts = dict.fromkeys(PARTS, 0)
        for name, parameter in self.model.named_parameters():
            if trained is None or name in trained:
                part = "low-rank adapters" if ".lora_" in name else parts.get(id(parameter), "rest")
                counts[part] += parameter.numel()
        return {part: count for part, count in counts.items() if count}


def meta_model(recipe: RetrofitRecipe, config: Any = None) -> MetaModel:
    """Build the recipe's model on the meta device, without network or weights.

    Args:
        config: of a loaded checkpoint, in place of the sizes in the package.

    Raises:
        ConfigError: the package does not know the checkpoint's sizes.
        InputError: no such model.
    """
    guard = recipe.guard
    with torch.device("meta"):
        model, visual = _base(recipe, config)
        built = build_guard(
            model,
            site=guard.site,
            patch_codes=guard.patch_codes,
            semantic_codes=guard.semantic_codes,
        )
    # Counting needs the guard's parameters, not its hooks.
    model.vqguard = built
    return MetaModel(model, get_adapter(model), visual)


def choose_trained(meta: MetaModel, recipe: StageRecipe, stage: int) -> set[str]:
    """Names of what the stage trains; all else of the model stops requiring a gradient.

    Low-rank adapters are added to the model where the recipe has them.
    """
    lora = getattr(recipe, "lora", None)
    if stage == 1:
        trained = meta.adapter.stage1_trainable(meta.model)
    elif lora is not None:
        trained = add_lora(meta.model, meta.adapter, lora)
    else:
        trained = meta.adapter.stage2_trainable(meta.model)
    names = {name for name, _ in trained}
    for name, parameter in meta.model.named_parameters():
        parameter.requires_grad_(name in names)
    return names


def _base(recipe: RetrofitRecipe, loaded: Any = None) -> tuple[Any, int]:
    entry = resolve_model(recipe.model)
    if loaded is not None:
        known = public_config(entry.location)
        visual = known.visual_tokens if known else recipe.stage1.max_length
        return AutoModelForImageTextToText.from_config(
            deepcopy(loaded), trust_remote_code=False
        ), visual
    if entry.source == "package":
        # Most plans are of other models: its classes and tokenizer take a while to import.
        from vqguard.recipes.planning.embedded import embedded_model

        return embedded_model()
    if entry.source == "path":
        described(entry.location)
        config = AutoConfig.from_pretrained(entry.location, trust_remote_code=False)
        visual = int(getattr(config, "image_seq_length", None) or recipe.stage1.max_length)
        with built_within(None, entry.location):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        return model, visual
    known = public_config(entry.location)
    if known is None:
        names = ", ".join(sizes.checkpoint for sizes in public_configs())
        raise ConfigError(
            f"the sizes of {entry.location} are not in the package (there are: {names}). Download "
            "the checkpoint's config.json into a folder and give its path as --model."
        )
    fields = dict(known.config)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    return AutoModelForImageTextToText.from_config(
        config, trust_remote_code=False
    ), known.visual_tokens


def _parts(model: nn.Module, adapter: Adapter) -> dict[int, str]:
    """Part of each parameter, by its id. A projector may lie inside of the vision encoder."""
    held: Any = model
    modules = {
        "language model": adapter.language_modules(model),
        "vision encoder": adapter.vision_modules(model),
        "projector": adapter.projectors(model),
        "codebooks": [held.vqguard],
    }
    return {id(p): part for part, some in modules.items() for m in some for p in m.parameters()}
