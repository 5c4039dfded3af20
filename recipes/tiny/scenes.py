"""Scenes of the llava-tiny world: glyphs on a textured background, drawn from a seed.

A scene is a 96 x 96 picture cut into 3 x 3 cells of 32 pixels; one to five cells hold a glyph.
Everything about a scene follows from `(split, seed, index)`, so no picture needs to be stored.

Splits share no seed, and some combinations of glyph, background colour and cell are *held out*:
training and calibration never draw them. The test split draws nothing but one part of them, the
validation split nothing but another, so what was tuned on the one is measured on the other.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vqguard.errors import ConfigError
from vqguard.recipes.tiny.glyphs import (
    GLYPHS,
    NEUTRAL_IDS,
    TOXIC_CATEGORIES,
    TOXIC_IDS,
    Sticker,
    glyph_pixels,
)

IMAGE_SIZE = 96
CELL_SIZE = 32
GRID = IMAGE_SIZE // CELL_SIZE
CELLS = GRID * GRID

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 55, 55),
    "green": (60, 160, 70),
    "blue": (60, 90, 200),
    "yellow": (225, 205, 70),
    "purple": (130, 60, 160),
    "pink": (235, 150, 190),
    "white": (232, 232, 232),
    "black": (38, 38, 38),
}
COLOUR_NAMES = tuple(COLOURS)

Split = Literal["train", "calibration", "validation", "test", "attack"]
HeldOut = Literal["validation", "test"]
Contents = Literal["neutral", "toxic", "any"]


@dataclass(frozen=True)
class Placement:
    """A glyph in a cell. `dx, dy`: its offset in the cell, `size`: its side, in pixels."""

    glyph: int
    cell: int
    dx: int
    dy: int
    size: int

    @property
    def top(self) -> int:
        """The first of its rows in the picture."""
        return (self.cell // GRID) * CELL_SIZE + self.dy

    @property
    def left(self) -> int:
        """The first of its columns in the picture."""
        return (self.cell % GRID) * CELL_SIZE + self.dx


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `texture_seed` fixes the background's grain."""

    colour: str
    texture_seed: int
    placements: tuple[Placement, ...]

    @property
    def words(self) -> list[str]:
        """The objects' words in reading order (cell by cell)."""
        return [GLYPHS[p.glyph].word for p in self.placements]

    @property
    def category(self) -> str:
        """The category of the first toxic object, or `neutral`."""
        categories = [GLYPHS[p.glyph].category for p in self.placements]
        return next((c for c in categories if c != "neutral"), "neutral")


def held_out(glyph: int, colour: str, cell: int) -> HeldOut | None:
    """Which part holds this combination out; None: training and calibration share it.

    For each glyph and colour, one cell in nine belongs to `test` (and attacks), one to
    `validation`.
    """
    return _PART_OF_REST.get((5 * glyph + 4 * COLOUR_NAMES.index(colour) + cell) % CELLS)


_PART_OF_REST: dict[int, HeldOut] = {0: "test", 1: "validation"}
_PART_OF_SPLIT: dict[Split, HeldOut | None] = {
    "train": None,
    "calibration": None,
    "validation": "validation",
    "test": "test",
    "attack": "test",
}


def scene_rng(split: Split, seed: int, index: int) -> np.random.Generator:
    """The generator of one scene. The split's name is part of the key: splits share no seed."""
    if split not in get_args(Split):
        raise ConfigError(f"expected a split among {get_args(Split)}, got {split!r}")
    return np.random.default_rng([zlib.crc32(split.encode()), seed, index])


def sample_scene(
    split: Split,
    seed: int,
    index: int,
    *,
    objects: tuple[int, int] = (1, 3),
    contents: Contents = "any",
    toxic_glyph: int | None = None,
) -> Scene:
    """Draw one scene.

    Args:
        split: which part of the world; decides the seed space and the allowed combinations.
        seed, index: the scene's name.
        objects: the least and the greatest number of objects, both included.
        contents: `neutral` (no toxic glyph), `toxic` (exactly one, the rest neutral) or
            `any` (every glyph equally likely, as an undefended model's training data has it).
        toxic_glyph: with `toxic`, the index of the toxic glyph; drawn when None.
    """
    rng = scene_rng(split, seed, index)
    count = int(rng.integers(objects[0], objects[1] + 1))
    colour = COLOUR_NAMES[int(rng.integers(len(COLOUR_NAMES)))]
    placements: list[Placement] = []
    free = set(range(CELLS))
    for glyph in _candidates(rng, contents, toxic_glyph):
        if len(placements) == count:
            break
        part = _PART_OF_SPLIT[split]
        cells = [c for c in sorted(free) if held_out(glyph, colour, c) == part]
        if not cells:
            continue  # the one held-out cell of this glyph is taken: the next candidate goes in
        cell = cells[int(rng.integers(len(cells)))]
        free.discard(cell)
        size = int(rng.integers(26, CELL_SIZE + 1))
        dx, dy = (int(v) for v in rng.integers(0, CELL_SIZE - size + 1, size=2))
        placements.append(Placement(glyph, cell, dx, dy, size))
    placements.sort(key=lambda p: p.cell)
    return Scene(colour, int(rng.integers(2**31)), tuple(placements))


def toxic_scene(split: Split, seed: int, index: int, category: str, distractors: int = 0) -> Scene:
    """A scene with one toxic object of a category, its glyphs in turn, and so many neutral ones.

    Raises:
        ConfigError: no toxic category of this name.
    """
    glyphs = [number for number in TOXIC_IDS if GLYPHS[number].category == category]
    if not glyphs:
        raise ConfigError(f"expected a category among {TOXIC_CATEGORIES}, got {category!r}")
    objects = (1 + distractors, 1 + distractors)
    glyph = glyphs[index % len(glyphs)]
    return sample_scene(split, seed, index, objects=objects, contents="toxic", toxic_glyph=glyph)


NEUTRAL_SCENES: dict[str, tuple[int, int]] = {
    "normal": (1, 3),
    "single": (1, 1),
    "crowded": (4, 5),
}
"""Kinds of neutral scenes, by their least and greatest number of objects."""


def neutral_scene(split: Split, seed: int, index: int, kind: str = "normal") -> Scene:
    """A scene without a toxic object, of a kind of `NEUTRAL_SCENES`."""
    return sample_scene(split, seed, index, objects=NEUTRAL_SCENES[kind], contents="neutral")


def _candidates(rng: np.random.Generator, contents: Contents, toxic_glyph: int | None) -> list[int]:
    """Glyphs in the order in which they are tried; a toxic one that must be there comes first."""
    if contents == "any":
        return [int(g) for g in rng.permutation(len(GLYPHS))]
    neutral = [int(g) for g in rng.permutation(NEUTRAL_IDS)]
    if contents == "neutral":
        return neutral
    return [int(rng.choice(TOXIC_IDS)) if toxic_glyph is None else toxic_glyph, *neutral]


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The scene's picture, uint8 (96, 96, 3), RGB."""
    canvas = background(scene)
    for p in scene.placements:
        lay(canvas, glyph_pixels(p.glyph, p.size), p.top, p.left)
    return finished(canvas)


def lay(canvas: NDArray[np.float32], glyph: Sticker, top: int, left: int) -> None:
    """Lay a glyph on a canvas, float32 (96, 96, 3), in place."""
    colour, alpha = glyph
    size = len(colour)
    window = canvas[top : top + size, left : left + size]
    window[:] = window * (1.0 - alpha) + colour


def finished(canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture of a canvas: rounded, and cut to 0..255."""
    picture: NDArray[np.uint8] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return picture


def draw_batch(scenes: Sequence[Scene]) -> NDArray[np.uint8]:
    """Pictures of several scenes, uint8 (B, 96, 96, 3)."""
    return np.stack([draw(scene) for scene in scenes])


_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)


def background(scene: Scene) -> NDArray[np.float32]:
    """The scene's ground without its objects, float32 (96, 96, 3)."""
    rng = np.random.default_rng(scene.texture_seed)
    base = np.array(COLOURS[scene.colour], dtype=np.float32) + rng.uniform(-14, 14, 3)
    texture = _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng)
    grain = rng.normal(0.0, 4.0, (IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    pattern: NDArray[np.float32] = base + (16.0 * texture + grain)[..., None]
    return pattern.astype(np.float32)


def _wave(rng: np.random.Generator) -> NDArray[np.float32]:
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(8, 40), rng.uniform(0, 6.28)
    along = _ROWS * np.sin(angle) + _COLUMNS * np.cos(angle)
    wave: NDArray[np.float32] = np.sin(along * (6.2832 / period) + phase)
    return wave


def _stripes(rng: np.random.Generator) -> NDArray[np.float32]:
    stripes: NDArray[np.float32] = np.sign(_wave(rng))
    return stripes


def _checks(rng: np.random.Generator) -> NDArray[np.float32]:
    side = int(rng.integers(6, 25))
    checks: NDArray[np.float32] = ((_ROWS // side) + (_COLUMNS // side)) % 2 * 2 - 1
    return checks


def _slope(rng: np.random.Generator) -> NDArray[np.float32]:
    angle = rng.uniform(0, 2 * np.pi)
    slope: NDArray[np.float32] = (_ROWS * np.sin(angle) + _COLUMNS * np.cos(angle)) / IMAGE_SIZE
    return slope


def _plain(rng: np.random.Generator) -> NDArray[np.float32]:
    return np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)


_TEXTURES: tuple[Callable[[np.random.Generator], NDArray[np.float32]], ...] = (
    _wave,
    _stripes,
    _checks,
    _slope,
    _plain,
)
