"""Inputs for a tiny model: pixels in its family's form, and a prompt that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from vqguard.adapters.families.family import RandomModel
from vqguard.adapters.random_inputs.pixels import (
    Maker,
    Pixels,
    frames,
    packed_patches,
    packed_videos,
    sized,
    square,
)
from vqguard.adapters.random_inputs.prompts import Layout, placeholders
from vqguard.adapters.registry import declared_family, get_adapter
from vqguard.adapters.runtime.quantise import passing
from vqguard.adapters.seams import Seam, submodule


def make_inputs(
    model: Any,
    images: Sequence[int] = (1,),
    seed: int = 0,
    *,
    modality: str = "image",
    right: bool = False,
) -> dict[str, Any]:
    """A padded batch for a tiny `model`: `images[i]` pictures (or videos) in row i.

    Families that take one picture a row get one in every row.
    Padding is on the left, on the right with `right`. Pixels are drawn from `seed`.
    """
    adapter = get_adapter(model)
    generator = torch.Generator().manual_seed(seed)
    random_model = declared_family(model.config.model_type).random_model
    seam = next(seam for seam in adapter.seams(model) if seam.modality == modality)
    if random_model.one_a_row:
        images = [1] * len(images)
    pixels: Pixels = {}
    counts: list[int] = []
    if sum(images):
        if random_model.pixels_by_row is not None:
            pixels = random_model.pixels_by_row(model, images, generator)
        else:
            pixels = _maker(model, seam, random_model)(model, sum(images), generator)
        counts = _counts(model, seam, pixels)
    layout = Layout(model, adapter, seam, list(images), counts, right, random_model.stamped_frames)
    return {**(random_model.prompt or placeholders)(layout), **pixels}


def _maker(model: Any, seam: Seam, random_model: RandomModel) -> Maker:
    """How a family's pixels look; found by the encoder's arguments where nothing is declared."""
    if seam.modality in random_model.pixels:
        return random_model.pixels[seam.modality]
    names = inspect.signature(getattr(submodule(model, seam.path, "seam"), seam.method)).parameters
    if "image_grid_thw" in names:
        return packed_patches
    if "video_grid_thw" in names:
        return packed_videos
    if seam.modality == "video":
        return frames
    return sized if "image_sizes" in names else square


def _counts(model: Any, seam: Seam, pixels: Pixels) -> list[int]:
    """Positions of each unit, as the unguarded model makes them."""
    adapter = get_adapter(model)
    arguments = adapter.seam_arguments(model, seam, pixels)
    with torch.no_grad(), passing(model):
        value = seam.read(adapter.run(model, seam, arguments))
    counts = [len(unit) for unit in adapter.split(seam, value, arguments)]
    return adapter.positions(model, counts)
