"""Real photographs without anything toxic in them, from the package scikit-image.

A handful of photographs gives many crops. Crops of one photograph resemble each other, so an
interval over them says less than one over as many photographs.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import numpy as np
from PIL import Image

from vqguard.errors import InputError

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg"),
    *("moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
"""Those of the package that a camera took. Drawings, scans and microscopes' are left out."""

_LEAST_SHARE = 0.4  # of the shorter side: a smaller crop shows a surface and no thing


def photograph_crop(number: int, rng: np.random.Generator, side: int) -> Image.Image:
    """A square crop at a random place of `PHOTOGRAPHS[number]`, RGB, `side` pixels wide and high.

    It covers 0.4 to 1 of the photograph's shorter side.

    Raises:
        InputError: the package that carries the photographs is not installed.
    """
    photograph = _photograph(PHOTOGRAPHS[number])
    cut = round(min(photograph.size) * rng.uniform(_LEAST_SHARE, 1.0))
    left = int(rng.integers(photograph.width - cut + 1))
    top = int(rng.integers(photograph.height - cut + 1))
    crop = photograph.crop((left, top, left + cut, top + cut))
    return crop.resize((side, side), Image.Resampling.LANCZOS)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(name: str) -> Image.Image:
    try:
        path = files("skimage") / "data" / name
    except ModuleNotFoundError as error:
        raise InputError(
            "photographs for false positives come from the package 'scikit-image', which is not "
            "installed. Install the extra for hard scenes: pip install 'vqguard[hard]'."
        ) from error
    with path.open("rb") as file, Image.open(file, formats=["PNG", "JPEG"]) as picture:
        rgb: Image.Image = picture.convert("RGB")
        return rgb
