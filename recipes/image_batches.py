"""Features of images before the quantiser, for the codebooks' start and the measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image

from vqguard.adapters import visual_features
from vqguard.adapters.features import VisualFeatures

_BATCH = 64


def pixel_inputs(
    processor: Any, images: Sequence[Image.Image], device: torch.device
) -> dict[str, torch.Tensor]:
    """What the image processor makes of images: ``pixel_values`` and whatever goes with them."""
    inputs = processor.image_processor(images=list(images), return_tensors="pt")
    return {name: value.to(device) for name, value in inputs.items()}


def image_features(model: Any, processor: Any, images: Sequence[Image.Image]) -> VisualFeatures:
    """Unquantised features of a batch of images at the guard's site."""
    inputs: dict[str, Any] = pixel_inputs(processor, images, model.device)
    return visual_features(model, **inputs)


@torch.no_grad()
def collect_features(
    model: Any,
    processor: Any,
    images: Iterable[Image.Image],
    *,
    tokens_an_image: int | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unquantised features of images at the guard's site.

    Args:
        model: guarded.
        tokens_an_image: keep so many random visual tokens of each image; None keeps all.

    Returns:
        ``(patches, semantic)``: float32 (n, d) and (m, d_s), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    patches, semantic = [], []
    model.eval()
    rest = iter(images)
    while batch := list(islice(rest, _BATCH)):
        features = image_features(model, processor, batch)
        semantic.append(features.semantic.flatten(0, 1).float().cpu())
        for tokens in features.tokens:
            rows = tokens.float().cpu()
            if tokens_an_image is not None and tokens_an_image < len(rows):
                rows = rows[torch.randperm(len(rows), generator=generator)[:tokens_an_image]]
            patches.append(rows)
    return torch.cat(patches), torch.cat(semantic)
