"""Inputs for a tiny model: pixels in its family's form, and a prompt that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vqguard.adapters.proof.random_models.pixels import BY_SAMPLE, Pixels, maker
from vqguard.adapters.proof.random_models.prompts import TEXT, placeholders
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.seams import Seam

ONE_A_ROW = (
    "blip",
    "blip-2",
    "git",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "kosmos-2.5",
    "pix2struct",
    "pp_formulanet",
    "udop",
    "vision-encoder-decoder",
)
"""Families that take one picture a row."""


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
    kind = model.config.model_type
    seam = next(one for one in adapter.seams(model) if one.modality == modality)
    if kind in ONE_A_ROW:
        images = [1] * len(images)
    pixels: Pixels = {}
    counts: list[int] = []
    if sum(images):
        if kind in BY_SAMPLE:
            pixels = BY_SAMPLE[kind](model, images, generator)
        else:
            pixels = maker(model, seam)(model, sum(images), generator)
        counts = _counts(model, seam, pixels)
    text = TEXT.get(kind, placeholders)
    return {**text(model, seam, list(images), counts, right), **pixels}


def _counts(model: Any, seam: Seam, pixels: Pixels) -> list[int]:
    """Positions of each unit, as the unguarded model makes them."""
    from vqguard.adapters.runtime.quantise import passing

    adapter = get_adapter(model)
    arguments = adapter.seam_arguments(model, seam, pixels)
    with torch.no_grad(), passing(model):
        value = seam.read(adapter.run(model, seam, arguments))
    counts = [len(unit) for unit in adapter.split(seam, value, arguments)]
    return adapter.positions(model, counts)
