"""Which model, processor and data a recipe means."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters import resolve_model
from vqguard.errors import ConfigError
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.samples import SampleSource, World
from vqguard.recipes.placement import loading
from vqguard.recipes.public_sizes import check_loaded
from vqguard.recipes.recipe import RetrofitRecipe

log = logging.getLogger(__name__)

CONTROL = "control"


def base_model(recipe: RetrofitRecipe, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The undefended model and its processor, spread over devices if the recipe says so.

    Raises:
        InputError: no such model.
        ArtefactError: shipped weights whose checksum does not match.
        ConfigError: a public checkpoint that is another kind of model than its recipe is for, or a
            device map for a model that ships with the package.
    """
    from transformers import AutoModelForImageTextToText

    entry = resolve_model(recipe.model)
    placement = loading(recipe.device_map)
    if entry.source == "package":
        from vqguard.recipes.tiny.weights import load_base

        if placement:
            raise ConfigError(f"{recipe.model} needs no device_map: it fits on one device")
        shipped, processor = load_base()
        held: Any = shipped
        return held.to(dtype), processor
    load: Any = AutoModelForImageTextToText.from_pretrained
    model = load(entry.location, dtype=dtype, **placement)
    different = check_loaded(model, entry.location)
    if different:
        _plan_again(recipe, model.config, different)
    return model, _processor(model, entry.location)


def _processor(model: Any, location: str) -> Any:
    from transformers import AutoProcessor, InstructBlipProcessor

    # InstructBLIP's Vicuna checkpoints name the processor for videos in their files.
    images = model.config.model_type == "instructblip"
    kind: Any = InstructBlipProcessor if images else AutoProcessor
    return kind.from_pretrained(location)


def _plan_again(recipe: RetrofitRecipe, config: Any, different: list[str]) -> None:
    """Say that the package's sizes were not the checkpoint's, and what it takes with its own."""
    from vqguard.recipes.planning.plan import plan

    again = plan(recipe, gpus=int(torch.cuda.is_available()), config=config)
    totals = [f"stage {one.stage} {one.memory.total / 1e9:.1f} GB" for one in again.stages]
    log.warning(
        "%s has other sizes than its plan was made with: %s. Training goes by the checkpoint; "
        "planned again: %s.",
        recipe.model,
        "; ".join(different),
        ", ".join(totals),
    )


def world_of(recipe: RetrofitRecipe) -> World | None:
    """The embedded world, if the recipe uses it; None if it names data of the user's own.

    Raises:
        ConfigError: neither the recipe nor the model brings data.
    """
    return _embedded(recipe) if recipe.data is None else None


def _embedded(recipe: RetrofitRecipe) -> World:
    if resolve_model(recipe.model).source != "package":
        raise ConfigError(
            f"{recipe.model} has no embedded data. Give a LLaVA-format file with --data and its "
            "images' root with --images."
        )
    from vqguard.recipes.tiny.world import TinyWorld

    return TinyWorld(recipe.seed, recipe.evaluation.split)


def source_of(
    recipe: RetrofitRecipe, *, skip_bad: bool = False, skipped: list[str] | None = None
) -> SampleSource:
    """The recipe's training samples.

    Args:
        skip_bad: leave bad entries of a data file out.
        skipped: collects what was left out.
    """
    if recipe.data is None:
        return _embedded(recipe)
    data = read_data(
        recipe.data, recipe.images, seed=recipe.seed, skip_bad=skip_bad, columns=recipe.columns
    )
    if skipped is not None:
        skipped += data.skipped
    return data


def control_model(run: Path) -> Any:
    """The run's control: the same base, trained as long without a quantiser. None if not made."""
    from transformers import AutoModelForImageTextToText

    folder = run / CONTROL / "model"
    if not (folder / "config.json").is_file():
        return None
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
