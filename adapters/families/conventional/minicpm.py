"""MiniCPM-V: all pictures of a batch in one strip."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.random_inputs.pixels import Pixels, noise


def strip(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(1, 3, 8, 8 * patches): all pictures in one strip, with their sizes in patches."""
    return {
        "pixel_values": noise(generator, 3, 8, 8 * 16 * images)[None],
        "target_sizes": torch.tensor([[4, 4]] * images),
    }


def video_strip(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """A strip of patches for each video, under the names of videos."""
    patches = strip(model, videos, generator)
    return {
        "pixel_values_videos": patches["pixel_values"],
        "target_sizes_videos": patches["target_sizes"],
    }


_STRIPS = RandomModel(
    config={"image_token_id": 100, "video_token_id": 101},
    pixels={"image": strip, "video": video_strip},
)

conventional(
    Family("minicpmv4_6", proven_from="5.12", random_model=_STRIPS),
    Family("minicpmv4_7", proven_from="5.20", random_model=_STRIPS),
    Family("minicpm_ocr", proven_from="5.22", random_model=_STRIPS),
)
