"""Pixels in the forms that several families' processors give them.

A form of one family's own is in its file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Pixels = dict[str, Any]
"""The encoder's arguments."""
Maker = Callable[[Any, int, torch.Generator], Pixels]


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
    time = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1) or 1
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


def frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 2, 3, 32, 32): two frames a video."""
    return {"pixel_values_videos": noise(generator, videos, 2, 3, 32, 32)}


def tiles(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 5, 3, 32, 32): pictures of mixed sizes, cut into at most four tiles beside the whole."""
    sizes = [(64, 64) if index % 2 == 0 else (30, 60) for index in range(images)]
    return {
        "pixel_values": noise(generator, images, 5, 3, 32, 32),
        "image_sizes": torch.tensor(sizes),
    }


def by_sample(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """(B, most images, 3, 32, 32): pictures by row of the batch, with empty ones in between."""
    pixels = noise(generator, sum(images), 3, 32, 32)
    filled = torch.zeros(len(images), max(images), 3, 32, 32)
    for row, part in enumerate(torch.split(pixels, list(images))):
        filled[row, : len(part)] = part
    return {"pixel_values": filled}


def large(side: int) -> Maker:
    """(n, 3, side, side)."""

    def make(model: Any, images: int, generator: torch.Generator) -> Pixels:
        return {"pixel_values": noise(generator, images, 3, side, side)}

    return make
