"""Images in batches: features before the quantiser, and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image

from vqguard.adapters import visual_features
from vqguard.adapters.features import VisualFeatures
from vqguard.images import MAX_BATCH_PIXELS, check_plain
from vqguard.safety_map import Verdict

IMAGES = 64
"""Images that a model sees at a time where nothing is trained."""

Item = TypeVar("Item")


def batches(
    items: Iterable[Item], picture: Callable[[Item], Image.Image] | None = None
) -> Iterator[list[Item]]:
    """The items in lists of `IMAGES`, the last one shorter.

    Args:
        items: each is drawn when its list is asked for; with `picture`, the first of the next too.
        picture: an item's decoded picture. Lists then end where their pictures would have more than
            `MAX_BATCH_PIXELS` together, so that large ones are not all in memory at a time; one
            that is larger comes alone.
    """
    batch: list[Item] = []
    pixels = 0
    for item in items:
        size = 0 if picture is None else picture(item).width * picture(item).height
        if batch and pixels + size > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
        batch.append(item)
        pixels += size
        if len(batch) == IMAGES:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def pixel_inputs(
    processor: Any, images: Sequence[Image.Image], device: torch.device
) -> dict[str, torch.Tensor]:
    """What the image processor makes of images: `pixel_values` and whatever goes with them.

    Raises:
        InputError: a picture that can be read in more than one way (`check_plain`).
    """
    for image in images:
        check_plain(image)
    inputs = processor.image_processor(images=list(images), return_tensors="pt")
    return {name: value.to(device) for name, value in inputs.items()}


def image_features(model: Any, processor: Any, images: Sequence[Image.Image]) -> VisualFeatures:
    """Unquantised features of a batch of images at the guard's site."""
    inputs: dict[str, Any] = pixel_inputs(processor, images, model.device)
    return visual_features(model, **inputs)


@torch.no_grad()
def screen_images(model: Any, processor: Any, images: Iterable[Image.Image]) -> list[Verdict]:
    """One verdict an image; the language model does not run.

    Raises:
        InputError: a picture that can be read in more than one way (`check_plain`).
    """
    model.eval()
    verdicts: list[Verdict] = []
    for batch in batches(images, lambda image: image):
        verdicts += model.screen(**pixel_inputs(processor, batch, model.device))
    return verdicts


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
        `(patches, semantic)`: float32 (n, d) and (m, d_s), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    patches, semantic = [], []
    model.eval()
    for batch in batches(images, lambda image: image):
        features = image_features(model, processor, batch)
        semantic.append(torch.cat(features.semantic_units).float().cpu())
        for tokens in features.tokens:
            rows = tokens.float().cpu()
            if tokens_an_image is not None and tokens_an_image < len(rows):
                rows = rows[torch.randperm(len(rows), generator=generator)[:tokens_an_image]]
            patches.append(rows)
    return torch.cat(patches), torch.cat(semantic)
