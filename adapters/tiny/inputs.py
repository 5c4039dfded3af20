"""Inputs for a tiny model: pixels in its family's form, and a prompt that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.registry import get_adapter
from vqguard.adapters.seams import Seam, submodule
from vqguard.adapters.tiny.sizes import BOS, PAD

Pixels = dict[str, Any]
Maker = Callable[[Any, int, torch.Generator], Pixels]
"""(model, images, generator) -> the encoder's arguments."""


def make_inputs(
    model: Any,
    images: Sequence[int] = (1,),
    seed: int = 0,
    *,
    modality: str = "image",
    right: bool = False,
) -> dict[str, Any]:
    """A padded batch for a tiny `model`: `images[i]` pictures (or videos) in row i.

    Padding is on the left, on the right with `right`. Pixels are drawn from `seed`.
    """
    adapter = get_adapter(model)
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    seam = next(one for one in adapter.seams(model) if one.modality == modality)
    pixels: Pixels = {}
    counts: list[int] = []
    if sum(images):
        pixels = maker(model, seam)(model, sum(images), generator)
        counts = _counts(model, seam, pixels)
    text = TEXT.get(kind, _placeholders)
    return {**text(model, seam, list(images), counts, right), **pixels}


def _counts(model: Any, seam: Seam, pixels: Pixels) -> list[int]:
    """Positions of each unit, as the unguarded model makes them."""
    from vqguard.adapters.encode import passing

    adapter = get_adapter(model)
    arguments = adapter.seam_arguments(model, seam, pixels)
    with torch.no_grad(), passing(model):
        value = seam.read(adapter.run(model, seam, arguments))
    if value is None and seam.deep:
        value = seam.levels(adapter.run(model, seam, arguments))[0]
    return [len(unit) for unit in adapter.split(seam, value, arguments)]


# -- text


def pad_rows(rows: list[list[int]], right: bool = False, fill: int = PAD) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    width = max(len(row) for row in rows)
    gaps = [[fill] * (width - len(row)) for row in rows]
    ids = [row + gap if right else gap + row for row, gap in zip(rows, gaps, strict=True)]
    masks = [
        [1] * len(row) + [0] * len(gap) if right else [0] * len(gap) + [1] * len(row)
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(masks)


def _placeholders(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Placeholders for every picture, a token between them, and a few words."""
    token = placeholder(model, seam)
    units = len(counts) // sum(images) if sum(images) else 0
    left = list(counts)
    rows, kinds = [], []
    for index, number in enumerate(images):
        row, kind = [BOS], [0]
        for _ in range(number):
            for _ in range(units):
                count = left.pop(0)
                row += [token] * count
                kind += [1 if seam.modality == "image" else 2] * count
            row.append(3)
            kind.append(0)
        words = list(range(5, 9 + index))
        rows.append(row + words)
        kinds.append(kind + [0] * len(words))
    ids, mask = pad_rows(rows, right)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(type(model).forward).parameters
    types, _ = pad_rows(kinds, right, fill=0)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = types
    if "token_type_ids" in names:
        inputs["token_type_ids"] = types.clamp(max=1)
    return inputs


def placeholder(model: Any, seam: Seam) -> int:
    """The token that the seam's features take the place of."""
    adapter = get_adapter(model)
    found = [getattr(model.config, name, None) for name in adapter.placeholders[seam.modality]]
    return int(next(token for token in found if token is not None))


# -- pixels


def maker(model: Any, seam: Seam) -> Maker:
    """How a family's pixels look; found by the encoder's arguments where nothing is declared."""
    declared = PIXELS.get((model.config.model_type, seam.modality))
    if declared is not None:
        return declared
    names = inspect.signature(getattr(submodule(model, seam.path, "seam"), seam.method)).parameters
    if "image_grid_thw" in names or "video_grid_thw" in names:
        return packed_patches
    return square


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Noise whose strength grows along the first dimension, so that no two pictures look alike."""
    pixels = torch.randn(*shape, generator=generator)
    return pixels * torch.linspace(0.3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))


def square(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 3, 32, 32)."""
    return {"pixel_values": noise(generator, images, 3, 32, 32)}


def packed_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """Patches of all pictures in one row, of mixed sizes, with their grids."""
    vision = model.config.vision_config
    patch = getattr(vision, "patch_size", 8)
    time = getattr(vision, "temporal_patch_size", 1) or 1
    grids = [(1, 4, 4) if index % 2 == 0 else (1, 4, 8) for index in range(images)]
    rows = [
        noise(generator, h * w, 3 * time * patch * patch) * (0.3 + index)
        for index, (_, h, w) in enumerate(grids)
    ]
    return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids)}


def packed_videos(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """The same with two frames each."""
    pixels = packed_patches(model, videos, generator)
    grid = pixels["image_grid_thw"].clone()
    grid[:, 0] = 2
    patches = noise(generator, int(grid.prod(-1).sum()), pixels["pixel_values"].shape[1])
    return {"pixel_values_videos": patches, "video_grid_thw": grid}


def sized(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 3, 32, 32) with image_sizes."""
    return {**square(model, images, generator), "image_sizes": torch.tensor([[32, 32]] * images)}


PIXELS: dict[tuple[str, str], Maker] = {}
TEXT: dict[str, Any] = {}
