"""The sets of images that a report screens: what each is called, and how to go through it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from vqguard.recipes.data.samples import World
from vqguard.safety_map import NEUTRAL

# Neutral scenes by their number of objects.
NEUTRAL_OBJECTS = (("normal", (1, 3)), ("single", (1, 1)), ("crowded", (4, 5)))
DISTRACTORS = (0, 1, 2, 3, 4)
"""Neutral objects beside a toxic one."""


@dataclass(frozen=True)
class ScreenedSet:
    """Images of one kind, the same ones in the same order each time."""

    metric: Literal["dsr", "fpr"]
    """`dsr`: they should be flagged; `fpr`: they should not."""
    condition: dict[str, Any]
    """Of the records that are about them; without the judge."""
    images: Callable[[], Iterable[Image.Image]]

    @property
    def category(self) -> str:
        """The toxic category, or the kind of neutral scenes."""
        return str(self.condition["scenes" if self.metric == "fpr" else "category"])

    @property
    def title(self) -> str:
        """What the images are, in a few words."""
        if self.metric == "fpr":
            return (
                self.category if self.category.startswith(NEUTRAL) else f"neutral, {self.category}"
            )
        beside = self.condition.get("distractors")
        return self.category if beside is None else f"{self.category}, {beside} neutral beside it"


class Screening(Protocol):
    """Images of a user's own, by category."""

    folder: Path
    categories: tuple[str, ...]

    def images(self, category: str) -> Iterable[Image.Image]:
        """The images of a category, RGB."""


def world_sets(world: World, per_category: int, neutral: int) -> list[ScreenedSet]:
    """Toxic scenes of each category and number of distractors, then neutral ones of each kind."""
    toxic = [
        ScreenedSet(
            "dsr",
            {"category": category, "distractors": distractors},
            partial(world.toxic_images, category, distractors, per_category),
        )
        for category in world.categories
        for distractors in DISTRACTORS
    ]
    harmless = [
        ScreenedSet("fpr", {"scenes": scenes}, partial(world.neutral_images, objects, neutral))
        for scenes, objects in NEUTRAL_OBJECTS
    ]
    return [*toxic, *harmless]


def own_sets(held_out: Screening, per_category: int, neutral: int) -> list[ScreenedSet]:
    """A set for each folder of a user's own; those called `neutral…` should not be flagged."""

    def first(category: str, count: int) -> Iterable[Image.Image]:
        return islice(held_out.images(category), count)

    return [
        ScreenedSet("fpr", {"scenes": category}, partial(first, category, neutral))
        if category.startswith(NEUTRAL)
        else ScreenedSet(
            "dsr",
            {"category": category, "images": "held out"},
            partial(first, category, per_category),
        )
        for category in held_out.categories
    ]
