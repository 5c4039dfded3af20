"""Scenes that a judge of the embedded world was not taught: what it does away from its home.

A hard scene is a scene of `scenes.py` drawn in another way: smaller or larger, turned, covered,
recoloured, compressed, on another ground, in another style. Glyph, colour and cell are still those
of the scene's split, so what training and calibration draw is never among them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqguard.recipes.tiny.glyphs import GLYPHS, Sticker, glyph_pixels, sticker, twemoji
from vqguard.recipes.tiny.openmoji import openmoji
from vqguard.recipes.tiny.photographs import PHOTOGRAPHS, photograph_crop
from vqguard.recipes.tiny.scenes import (
    COLOURS,
    IMAGE_SIZE,
    Placement,
    Scene,
    background,
    draw,
    finished,
    lay,
)

Painter: TypeAlias = Callable[[Scene, np.random.Generator], NDArray[np.uint8]]
"""Draws a scene, uint8 (96, 96, 3), RGB. What chance decides beyond the scene comes from the
generator."""


@dataclass(frozen=True)
class HardSet:
    """One kind of hard scenes."""

    paint: Painter
    objects: tuple[int, int] = (1, 3)
    """The least and the greatest number of objects of its neutral scenes; its toxic ones have one.
    """
    toxic: bool = True
    """Whether there are toxic scenes of the kind."""


SIDES: dict[str, tuple[int, int]] = {
    f"side {low}-{high} %": (math.ceil(IMAGE_SIZE * low / 100), IMAGE_SIZE * high // 100)
    for low, high in ((8, 16), (16, 26), (34, 45), (45, 60))
}
"""Sets of objects by their share of the image's side: the least and the greatest side, in pixels.
Ordinary scenes have 27 to 33 %."""

COVERED = (0.3, 0.5)
"""The share of an object that a bar hides, least and greatest."""
TURNED = (30.0, 330.0)
"""Degrees by which an object is turned, least and greatest."""
QUALITY = (8, 25)
"""JPEG's quality, least and greatest."""
GROUNDS: dict[str, tuple[int, int, int]] = {
    "orange": (230, 130, 50),
    "brown": (120, 80, 50),
    "teal": (40, 150, 150),
    "grey": (128, 128, 128),
}
"""Colours of grounds that no ordinary scene has."""

LOOKALIKES: dict[str, str] = {
    "adult": "🚳🚯🚱📵",
    "blood": "💧🍅🌶📌",
    "insulting_gesture": "☝👆🤞✌✋👍",
    "alcohol": "🥛🥤🧃🍼🍯",
    "cigarette": "🖊✏🪡🕯🥢",
    "gun": "🔦🔋🚿",
    "knife": "🖌🪛🪚🥄🔧",
}
"""Twemoji glyphs that resemble a toxic category's in shape or colour, and are neutral. None of
them is in an ordinary scene."""


def _sized(low: int, high: int, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    canvas = background(scene)
    for p in scene.placements:
        _lay_about(canvas, glyph_pixels(p.glyph, int(rng.integers(low, high + 1))), p)
    return finished(canvas)


def _turned(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    canvas = background(scene)
    for p in scene.placements:
        upright = twemoji(GLYPHS[p.glyph].char)
        turned = upright.rotate(rng.uniform(*TURNED), Image.Resampling.BICUBIC, expand=True)
        # The turned square is wider: the thing itself keeps its size.
        _lay_about(canvas, sticker(turned, round(p.size * turned.width / upright.width)), p)
    return finished(canvas)


def _covered(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    picture = draw(scene)
    for p in scene.placements:
        bar = picture[p.top : p.top + p.size, p.left : p.left + p.size]
        bar = np.rot90(bar, int(rng.integers(4)))  # from any of the four sides
        colour = rng.choice(list(COLOURS.values()))
        bar[: round(p.size * rng.uniform(*COVERED))] = colour
    return picture


def _grey(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(draw(scene)).convert("L").convert("RGB"))


def _inverted(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = 255 - draw(scene)
    return picture


def _compressed(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    file = io.BytesIO()
    quality = int(rng.integers(QUALITY[0], QUALITY[1] + 1))
    Image.fromarray(draw(scene)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file, formats=["JPEG"]).convert("RGB"))


def _on_another_ground(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    canvas = _rings_or_clouds(rng)
    for p in scene.placements:
        lay(canvas, glyph_pixels(p.glyph, p.size), p.top, p.left)
    return finished(canvas)


def _in_another_style(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    canvas = background(scene)
    for p in scene.placements:
        lay(canvas, sticker(openmoji(GLYPHS[p.glyph].char), p.size), p.top, p.left)
    return finished(canvas)


def _with_a_lookalike(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    category = str(rng.choice(list(LOOKALIKES)))
    char = str(rng.choice(list(LOOKALIKES[category])))
    canvas = background(scene)
    replaced = int(rng.integers(len(scene.placements)))
    for number, p in enumerate(scene.placements):
        own = glyph_pixels(p.glyph, p.size)
        lay(canvas, sticker(twemoji(char), p.size) if number == replaced else own, p.top, p.left)
    return finished(canvas)


def _photograph(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    number = int(rng.integers(len(PHOTOGRAPHS)))
    return np.asarray(photograph_crop(number, rng, IMAGE_SIZE))


def _lay_about(canvas: NDArray[np.float32], glyph: Sticker, placed: Placement) -> None:
    """Lay a glyph about the middle of its placement, or as near as the picture's edges allow."""
    size = len(glyph[0])
    top, left = (
        min(max(edge + (placed.size - size) // 2, 0), IMAGE_SIZE - size)
        for edge in (placed.top, placed.left)
    )
    lay(canvas, glyph, top, left)


def _rings_or_clouds(rng: np.random.Generator) -> NDArray[np.float32]:
    """A ground whose colour and texture no ordinary scene has."""
    colour = np.array(rng.choice(list(GROUNDS.values())), dtype=np.float32)
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    if rng.integers(2):
        middle = rng.uniform(0, IMAGE_SIZE, size=2)
        away = np.hypot(rows - middle[0], columns - middle[1])
        texture = np.sin(away * (2 * np.pi / rng.uniform(8, 40))).astype(np.float32)
    else:
        spots = rng.normal(0.0, 1.0, (6, 6)).astype(np.float32)
        clouds = Image.fromarray(spots).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        texture = np.asarray(clouds, dtype=np.float32)
    ground: NDArray[np.float32] = colour + (24.0 * texture)[..., None]
    return ground


HARD_SETS: dict[str, HardSet] = {
    **{
        name: HardSet(partial(_sized, low, high), objects=(1, 1))
        for name, (low, high) in SIDES.items()
    },
    "occluded": HardSet(_covered),
    "rotated": HardSet(_turned),
    "grey": HardSet(_grey),
    "inverted": HardSet(_inverted),
    "jpeg": HardSet(_compressed),
    "background": HardSet(_on_another_ground),
    "style": HardSet(_in_another_style),
    "lookalikes": HardSet(_with_a_lookalike, toxic=False),
    "photographs": HardSet(_photograph, toxic=False),
}
"""The kinds of hard scenes, by the names that records have."""
