"""A benchmark in a folder: found out which, checked, and handed on as cases, questions, pictures.

Nothing is downloaded. What is missing is named, with where its authors publish it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.benchmarks.layout import Layout, Part, Use, filled, layouts, plain
from vqguard.recipes.benchmarks.rows import Row, read_rows
from vqguard.recipes.data.held_out_set import (
    ATTACKS,
    QUESTIONS,
    SCREENING,
    TEXT,
    HeldOutSet,
    screening_images,
)
from vqguard.recipes.data.image_roots import FolderRoot
from vqguard.recipes.data.labelled_images import category_files
from vqguard.recipes.data.samples import AttackCase, Opener, Question
from vqguard.safety_map import NEUTRAL

log = logging.getLogger(__name__)

_GREY = (128, 128, 128)
_SIDE = 336  # of the grey picture beside requests without one; the processor makes its own of it
_SEED = 0  # of the order in which cases are taken: published files are sorted by category


class Tests(Protocol):
    """What is measured on: tests of a user's own, or a benchmark."""

    folder: Path
    categories: tuple[str, ...]

    @property
    def name(self) -> str:
        """What records call it."""

    def questions(self, each: int) -> dict[str, list[Question]]:
        """Questions with a right answer by task, at most so many of one."""

    def attack_cases(self, count: int) -> list[AttackCase]:
        """Requests to be refused."""

    def benign_cases(self, count: int) -> list[AttackCase]:
        """Requests to be answered."""

    def images(self, category: str) -> Iterator[Image.Image]:
        """The pictures of a category."""

    @property
    def text(self) -> str | None:
        """A text for the language model's perplexity."""


@dataclass(frozen=True)
class Item:
    """A record of a benchmark."""

    part: Part
    row: Row
    where: str
    """How messages call it."""
    picture: Opener | None

    def filled(self, text: str) -> str:
        """A text of the layout with the record's values in it."""
        return filled(text, self.row, self.where).strip()

    def told(self, row: Row) -> dict[str, Any]:
        """What its authors' grader is told of an answer, which is a column of `row`."""
        return {
            filled(key, row, self.where): plain(value, row, self.where)
            for key, value in self.part.answer.items()
        }

    @property
    def task(self) -> str:
        """What its part is called."""
        return self.filled(self.part.name)

    def case(self) -> AttackCase:
        """As a request beside its picture, or beside a grey one."""
        picture = (
            Image.new("RGB", (_SIDE, _SIDE), _GREY) if self.picture is None else self.picture()
        )
        return AttackCase(picture, self.filled(self.part.request), self.filled(self.part.opening))

    def question(self) -> Question:
        """As a question."""
        picture = None if self.picture is None else self.picture()
        part = self.part
        expected = self.filled(part.expected)
        return Question(picture, self.filled(part.request), expected, scoring=part.scoring)


class Benchmark:
    """A benchmark, checked when it is opened.

    Args:
        folder: as its authors publish it, unpacked.
        layout: which one it is.
        start: where in the folder the layout's paths start from.
        follow_links: as of `image_roots.FolderRoot`.

    Raises:
        DataError: records that do not fit, or of which no picture is there.
    """

    def __init__(
        self, folder: Path, layout: Layout, start: Path, *, follow_links: bool = False
    ) -> None:
        self.folder = folder
        self.layout = layout
        self._start = start
        self._root = FolderRoot(start, follow_links=follow_links)
        self.categories = _categories(layout, start)
        self.items = self._checked()

    @property
    def name(self) -> str:
        """What records call it."""
        return self.layout.name

    @property
    def text(self) -> str | None:
        """It has none."""
        return None

    def attack_cases(self, count: int) -> list[AttackCase]:
        """Its requests to be refused, in a fixed random order."""
        return [item.case() for item in self._of("attack")[:count]]

    def benign_cases(self, count: int) -> list[AttackCase]:
        """Its requests to be answered, in a fixed random order."""
        return [item.case() for item in self._of("benign")[:count]]

    def questions(self, each: int) -> dict[str, list[Question]]:
        """Its questions with a right answer by task, in a fixed random order."""
        found: dict[str, list[Question]] = {}
        for item in self._of("question"):
            mine = found.setdefault(item.task, []) if item.part.expected else []
            if item.part.expected and len(mine) < each:
                mine.append(item.question())
        return found

    def ungraded(self) -> list[Item]:
        """Its questions whose answers only its authors' grader can judge, in the files' order."""
        return [item for item in self.items if item.part.answers]

    def images(self, category: str) -> Iterator[Image.Image]:
        """The pictures of a category, RGB.

        Raises:
            ImageError: an unusable one.
            InputError: there is none.
        """
        return screening_images(self._start, category)

    def _of(self, use: Use) -> list[Item]:
        mine = [item for item in self.items if item.part.use == use]
        return [mine[place] for place in np.random.default_rng(_SEED).permutation(len(mine))]

    def _checked(self) -> list[Item]:
        items: list[Item] = []
        missing: Counter[str] = Counter()
        first = ""
        for part in self.layout.parts:
            for path in sorted(self._start.glob(part.records)):
                for row in read_rows(path, part.form):
                    where = f"{path}, record {row['row']}"
                    if not _wanted(part, row, where):
                        continue
                    filled(part.request, row, where)  # the columns that it needs
                    filled(part.expected, row, where)
                    names = [filled(name, row, where) for name in part.image]
                    there = next((name for name in names if self._root.holds(name)), None)
                    if names and there is None:
                        missing[part.records] += 1
                        first = first or names[0]
                        continue
                    picture = None if there is None else self._root.opener(there)
                    items.append(Item(part, row, where, picture))
        self._tell_missing(items, missing.total(), first)
        return items

    def _tell_missing(self, items: Sequence[Item], missing: int, first: str) -> None:
        if not missing:
            return
        said = (
            f"{self.folder}: {self.layout.title}: {missing} of {missing + len(items)} records are "
            f"without their picture, as {self._start / first}. {remedy(self.layout)}"
        )
        if not items:
            raise DataError(said)
        log.warning("%s They are left out.", said)


def open_tests(folder: Path, *, follow_links: bool = False) -> Tests:
    """The tests in a folder: a user's own (`data.held_out_set`), or a benchmark's.

    Raises:
        InputError: neither.
        DataError: what is there does not fit, or is not whole.
    """
    own = any((folder / name).exists() for name in (QUESTIONS, ATTACKS, SCREENING, TEXT))
    if own or not folder.is_dir():
        return HeldOutSet(folder, follow_links=follow_links)
    known = layouts()
    found = [(layout, place) for layout in known if (place := _place(layout, folder)) is not None]
    if len(found) > 1:
        titles = " or ".join(layout.title for layout, _ in found)
        raise DataError(f"{folder}: holds {titles}; name the folder of one of them")
    if found:
        layout, start = found[0]
        return Benchmark(folder, layout, start, follow_links=follow_links)
    for layout in known:
        if any(next(folder.glob(sign), None) is not None for sign in layout.signs):
            expected = " or ".join(part.records for part in layout.parts)
            raise DataError(
                f"{folder}: looks like {layout.title}, but {expected} is missing. {remedy(layout)}"
            )
    raise InputError(
        f"{folder}: expected tests of yours ({QUESTIONS}, {ATTACKS}, {SCREENING}/ or {TEXT}) or a "
        f"benchmark as its authors publish it: {', '.join(layout.title for layout in known)}. "
        "docs/public-benchmarks.md says where each is published, and which files it has"
    )


def remedy(layout: Layout) -> str:
    """Where a benchmark comes from, and what to do with it."""
    return f"Its authors publish it at {layout.published}: {layout.fetch}."


def _place(layout: Layout, folder: Path) -> Path | None:
    """Where in the folder the layout's paths start from; None: it is not this benchmark."""
    for inside in layout.inside:
        start = folder / inside
        if any(next(start.glob(part.records), None) is not None for part in layout.parts):
            return start
        if any((start / name).is_dir() for name in layout.categories):
            return start
    return None


def _categories(layout: Layout, start: Path) -> tuple[str, ...]:
    if not layout.categories:
        return ()
    missing = [name for name in layout.categories if not (start / name).is_dir()]
    if missing:
        log.warning("%s: %s: without %s", start, layout.title, ", ".join(missing))
    for name in layout.categories:
        if name not in missing and next(category_files(start / name, []), None) is None:
            raise DataError(f"{start / name}: {layout.title}: holds no picture. {remedy(layout)}")
    harmless = sorted(path.name for path in start.glob(f"{NEUTRAL}*") if path.is_dir())
    return (*(name for name in layout.categories if name not in missing), *harmless)


def _wanted(part: Part, row: Row, where: str) -> bool:
    for column, pattern in part.only.items():
        value = "" if row.get(column, ...) is None else filled(f"{{{column}}}", row, where)
        if not fnmatchcase(value, pattern):
            return False
    return True
