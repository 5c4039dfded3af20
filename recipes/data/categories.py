"""Labelled images as folders: one folder a category. What is in them is read, or counted.

Hidden folders (`.ipynb_checkpoints`, `.cache`) are a tool's own copies: they are no category and
hold none of its images.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vqguard.errors import InputError
from vqguard.images import iter_images

log = logging.getLogger(__name__)

HIDDEN = "in a hidden folder"


def category_names(folder: Path) -> list[str]:
    """The categories of a folder, sorted; the log names the hidden folders that are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    hidden = [name for name in names if name.startswith(".")]
    if hidden:
        log.warning("%s: left out the hidden folders %s", folder, ", ".join(hidden))
    return [name for name in names if name not in hidden]


def category_files(category: Path, skipped: list[str]) -> Iterator[Path]:
    """The image files of a category's folder.

    Args:
        category: the folder.
        skipped: gets a line for each file that is no image, or lies in a hidden folder.
    """
    for path in iter_images([category], lambda path, why: skipped.append(f"{path}: {why}")):
        inner = path.relative_to(category) if path.is_relative_to(category) else path
        if any(part.startswith(".") for part in inner.parent.parts):
            skipped.append(f"{path}: {HIDDEN}")
        else:
            yield path


class CategoryTable:
    """How many images of each category were read and skipped.

    Args:
        folder: of the categories' folders; None where they have none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._read: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()

    def add(self, category: str, *, read: int = 0, skipped: int = 0) -> None:
        """Count images of a category."""
        self._read[category] += read
        self._skipped[category] += skipped

    def add_all(self, categories: Iterable[str], *, read: int = 0, skipped: int = 0) -> None:
        """Count images that belong to each of the categories."""
        for category in categories:
            self.add(category, read=read, skipped=skipped)

    def require(self, category: str, reasons: Sequence[str] = ()) -> None:
        """Raise `InputError` where no image of a category was read; `reasons` say why."""
        if not self._read[category]:
            first = f" The first: {reasons[0]}." if reasons else ""
            where = category if self.folder is None else self.folder / category
            raise InputError(
                f"{where}: no image of this category can be read ({self._skipped[category]} "
                f"skipped).{first} Put images in, or take the category away."
            )

    def finish(self, reasons: Sequence[str] = ()) -> None:
        """Write the table into the log.

        Raises:
            InputError: as `require` does, for the first category without an image.
        """
        width = max(map(len, [*self._read, "category"]))
        lines = [f"{'category':<{width}}  {'read':>8}  {'skipped':>8}"]
        lines += [
            f"{name:<{width}}  {self._read[name]:>8}  {self._skipped[name]:>8}"
            for name in self._read
        ]
        log.info("images by category:\n%s", "\n".join(lines))
        for category in self._read:
            self.require(category, reasons)
