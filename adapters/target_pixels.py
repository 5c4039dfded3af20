"""The pixels that an attack moves: a model's image processor as a differentiable function."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqguard.errors import ConfigError, InputError


class Normalise:
    """The image processor of a model as a differentiable function of pixels in [0, 1].

    Only mean and std are applied; the constructor proves on a random image that the processor does
    nothing else at the size it produces, because a loss on other pixels than the model's own would
    make every attack look weak.

    Args:
        processor: has an `image_processor`.

    Raises:
        ConfigError: the size is not fixed, or the processor does more than normalise.
    """

    def __init__(self, processor: Any) -> None:
        images = processor.image_processor
        self.size = _fixed_size(images)
        normalises = getattr(images, "do_normalize", True)
        self.mean = torch.tensor(images.image_mean if normalises else [0.0] * 3).view(3, 1, 1)
        self.std = torch.tensor(images.image_std if normalises else [1.0] * 3).view(3, 1, 1)
        noise = np.random.default_rng(0).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        self.probe = Image.fromarray(noise)
        expected = images(images=self.probe, return_tensors="pt")["pixel_values"]
        ours = self(torch.from_numpy(noise).permute(2, 0, 1)[None].float() / 255.0)
        if expected.shape != ours.shape or not torch.allclose(expected.float(), ours, atol=1e-3):
            raise ConfigError(
                f"{type(images).__name__} does more than normalise a {self.size} image: it gives "
                f"{tuple(expected.shape)} and this target {tuple(ours.shape)}, or other values; "
                "write a target for this family (loss and succeeded)"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] -> the same, normalised.

        Raises:
            InputError: pixels of another size.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.size):
            raise InputError(
                f"expected pixels of shape (B, 3, {self.size[0]}, {self.size[1]}), got "
                f"{tuple(pixels.shape)}; resize before the attack, as the model's processor does"
            )
        return (pixels - self.mean.to(pixels)) / self.std.to(pixels)


def _fixed_size(images: Any) -> tuple[int, int]:
    """(height, width) that an image processor produces for every image."""
    for name, used in (("crop_size", "do_center_crop"), ("size", "do_resize")):
        size = getattr(images, name, None)
        if size is None or not getattr(images, used, False):
            continue
        size = dict(size)
        height, width = size.get("height"), size.get("width")
        if height and width:
            return int(height), int(width)
    raise ConfigError(
        f"{type(images).__name__} has no fixed output size (height and width in crop_size or "
        "size); give the processor one, so that pixels can be attacked at the model's resolution"
    )
