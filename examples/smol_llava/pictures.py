"""The pictures of this example: scenes of llava-tiny's world, and crops of photographs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from examples.smol_llava.wording import Photograph
from vqguard.images import open_image
from vqguard.recipes.tiny.scenes import Scene, draw, sample_scene

LEAST_SHARE, SIDE = 0.55, 256


def picture_of(scene: Scene) -> Image.Image:
    """A scene's picture, RGB, 96 x 96."""
    return Image.fromarray(draw(scene))


def train_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes of the training split: one object in half of them, else up to three."""
    return [
        sample_scene("train", seed, i, objects=(1, 1) if i % 2 else (1, 3)) for i in range(count)
    ]


@lru_cache(maxsize=32)
def photograph(file: str) -> Image.Image:
    """A photograph that comes with scikit-image or matplotlib, RGB, found without importing it."""
    for package, folder in (("skimage", "data"), ("matplotlib", "mpl-data/sample_data")):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / folder / file
            if path.is_file():
                return open_image(path)
    raise FileNotFoundError(f"{file}: neither scikit-image nor matplotlib has it installed")


def crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square piece, mirrored half of the time, at 256 pixels."""
    side = int(min(picture.size) * rng.uniform(LEAST_SHARE, 1.0))
    left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
    piece = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece


def crops(
    photographs: Sequence[Photograph], seed: int, each: int
) -> Iterator[tuple[Photograph, Image.Image]]:
    """So many pieces of each photograph."""
    for number, one in enumerate(photographs):
        rng = np.random.default_rng([seed, number])
        for _ in range(each):
            yield one, crop(photograph(one.file), rng)
