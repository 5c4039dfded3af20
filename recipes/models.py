"""Which model and processor a recipe means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    InstructBlipProcessor,
)

from vqguard.adapters import resolve_model
from vqguard.adapters.sizes.built import described, opening
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.errors import ConfigError
from vqguard.recipes.placement import loading
from vqguard.recipes.public_sizes import check_loaded
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import MODEL
from vqguard.recipes.tiny.weights import load_base, load_processor

CONTROL = "control"


def base_model(recipe: RetrofitRecipe, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The undefended model and its processor, spread over devices if the recipe says so.

    Raises as `named_model`.
    """
    return named_model(recipe.model, dtype, recipe.device_map)


def named_model(
    name: str, dtype: torch.dtype = torch.float32, device_map: str | None = None
) -> tuple[Any, Any]:
    """The undefended model of this name and its processor, spread over devices if wanted.

    Raises:
        InputError: no such model.
        ArtefactError: shipped weights whose checksum does not match.
        ConfigError: a public checkpoint that is another kind of model than its recipe is for, or a
            device map for a model that ships with the package.
    """
    entry = resolve_model(name)
    placement = loading(device_map)
    if entry.source == "package":
        if placement:
            raise ConfigError(f"{name} needs no device_map: it fits on one device")
        shipped, processor = load_base()
        held: Any = shipped
        return held.to(dtype), processor
    load: Any = AutoModelForImageTextToText.from_pretrained
    with opening(entry.location):
        model = load(
            entry.location, dtype=dtype, use_safetensors=True, trust_remote_code=False, **placement
        )
    if getattr(model, "vqguard", None) is not None:
        raise ConfigError(f"{name} holds a guarded model; a retrofit starts from an undefended one")
    check_loaded(model, entry.location)
    return model, _processor(model.config.model_type, entry.location)


def base_processor(recipe: RetrofitRecipe) -> Any:
    """The undefended model's processor, without the model.

    Raises:
        InputError: no such model.
        ArtefactError: files that no model has.
    """
    entry = resolve_model(recipe.model)
    if entry.source == "package":
        return load_processor()
    return _processor(str(described(entry.location).get("model_type")), entry.location)


def _processor(model_type: str, location: str) -> Any:
    # InstructBLIP's Vicuna checkpoints name the processor for videos in their files.
    images = model_type == "instructblip"
    kind: Any = InstructBlipProcessor if images else AutoProcessor
    return open_processor(location, kind)


def has_control(run: Path) -> bool:
    """Whether a run's control is whole."""
    return (run / CONTROL / MODEL / "config.json").is_file()


def save_control(run: Path, model: Any) -> None:
    """Write a run's control: the same base, trained as long without a quantiser."""
    beside = run / CONTROL / f"{MODEL}.new"
    model.save_pretrained(beside)
    beside.replace(run / CONTROL / MODEL)


def control_model(run: Path) -> Any:
    """A run's control in float32, for evaluation. None if not made."""
    if not has_control(run):
        return None
    folder = run / CONTROL / MODEL
    load: Any = AutoModelForImageTextToText.from_pretrained
    with opening(folder):
        model = load(folder, dtype="float32", use_safetensors=True, trust_remote_code=False)
    return model.eval()
