"""Labelled images for calibration: one folder a category, or a list of labels beside a folder.

CSV, one image a line: `path,label[,label...]`. JSONL: `{"image": path, "labels": [...]}` a line.
Paths start from the images' folder and stay inside it. No header, no other keys.

Hidden folders (`.ipynb_checkpoints`, `.cache`) are a tool's own copies: they are no category and
hold none of its images.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vqguard.bounded import read_text
from vqguard.errors import ConfigError, DataError, ImageError, InputError
from vqguard.files import file_sha256
from vqguard.images import iter_images, open_image
from vqguard.safety_map import NEUTRAL
from vqguard.text_files import parse_json

log = logging.getLogger(__name__)

MAX_LABELS_FILE = 64 * 2**20
"""Bytes of a list of labels: half a million images."""
MAX_IMAGES = 1_000_000
"""Lines of one."""
MAX_LABELS, MAX_LABEL = 32, 100
"""Labels of an image, and characters of one."""
MAX_LINE = 8192
"""Characters of a line; a path has at most 4 096."""
TEST_EVERY, FEWEST_TO_TEST = 5, 20
"""Which images of a category a retrofit leaves out of its calibration, to measure on; a category of
fewer has none to spare."""
_SHOWN = 3
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
        for line in lines:
            log.info("%s", line)
        for category in self._read:
            self.require(category, reasons)


@dataclass(frozen=True)
class LabelledFile:
    """An image file and its categories, `neutral` or toxic ones."""

    path: Path
    labels: tuple[str, ...]


def files_of_folders(folder: Path, skipped: list[str]) -> list[LabelledFile]:
    """The images in one folder a category, one of them `neutral`.

    Files that are no images are listed in `skipped`.

    Raises:
        InputError: the folders are not there, or one without an image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. It holds one folder a category.")
    names = category_names(folder)
    if NEUTRAL not in names or len(names) < 2:
        raise InputError(
            f"{folder}: expected one folder a category, one of them called {NEUTRAL!r} and at "
            f"least one toxic; found {', '.join(names) or 'none'}."
        )

    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{folder / name}: the name of this category is not UTF-8, and no map can hold it; "
                "rename the folder"
            ) from error

    files = []
    table = CategoryTable(folder)
    for name in names:
        before = len(skipped)
        of_name = [LabelledFile(path, (name,)) for path in category_files(folder / name, skipped)]
        table.add(name, read=len(of_name), skipped=len(skipped) - before)
        table.require(name, skipped[before:])
        files += of_name
    return files


def files_of_list(path: Path, folder: Path) -> list[LabelledFile]:
    """The images that a list names, `.csv` or `.jsonl`.

    Raises:
        DataError: for a line that does not follow the format, with its number.
    """
    text = read_text(path, MAX_LABELS_FILE, DataError)
    lines = text.splitlines()
    if len(lines) > MAX_IMAGES:
        raise DataError(f"{path}: {len(lines):,} lines, at most {MAX_IMAGES:,} are read; split it")
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path}: expected a .csv or .jsonl list of labels")
    root = folder.resolve()
    files = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise DataError(f"{where}: longer than {MAX_LINE:,} characters")
        if not line.strip():
            continue
        name, labels = (_of_csv if path.suffix == ".csv" else _of_json)(line, where)
        files.append(LabelledFile(_inside(root, name, where), _checked(labels, where)))
    if not files:
        raise DataError(f"{path} names no image: write `path,label` lines")
    names = {label for file in files for label in file.labels}
    if NEUTRAL not in names or len(names) < 2:
        raise DataError(
            f"{path}: expected images labelled {NEUTRAL!r} and images of at least one toxic "
            f"category; its labels are {', '.join(sorted(names))}"
        )
    return files


def merged(files: Sequence[LabelledFile], warnings: list[str]) -> list[LabelledFile]:
    """The same without copies: files of the same bytes are one image, with the labels of all.

    Copies are named in `warnings`, and so are categories of a single image.

    Raises:
        InputError: for an image that is neutral and toxic at once.
    """
    firsts: dict[str, LabelledFile] = {}
    copies: list[str] = []
    for file in files:
        digest = file_sha256(file.path)
        first = firsts.get(digest)
        if first is None:
            firsts[digest] = file
            continue
        labels = tuple(dict.fromkeys((*first.labels, *file.labels)))
        if NEUTRAL in labels and len(labels) > 1:
            raise InputError(
                f"{file.path} ({', '.join(file.labels)}) and {first.path} "
                f"({', '.join(first.labels)}) are the same image: it cannot be {NEUTRAL} and "
                "toxic. Remove one of them"
            )
        copies.append(f"{file.path} is a copy of {first.path}")
        firsts[digest] = LabelledFile(first.path, labels)
    if copies:
        more = f" and {len(copies) - _SHOWN} more" if len(copies) > _SHOWN else ""
        warnings.append(
            f"{'; '.join(copies[:_SHOWN])}{more}: an image counts once, under all its labels"
        )
    kept = list(firsts.values())
    counts = {label: 0 for file in kept for label in file.labels}
    for file in kept:
        for label in file.labels:
            counts[label] += 1
    warnings += [
        f"{label} has one image, and one picture does not say what is like it: give at least 20"
        for label, count in counts.items()
        if count == 1
    ]
    return kept


def labelled_files(
    folder: Path, labels: Path | None, skipped: list[str], warnings: list[str]
) -> list[LabelledFile]:
    """The labelled images of a folder, each once.

    Args:
        folder: one folder a category; or what the paths in `labels` start from.
        labels: a list of images and their labels; None: the folders tell.
        skipped: gets the files that are no images.
        warnings: as of `merged`.

    Raises:
        InputError: as `files_of_folders` and `merged`.
        DataError: as `files_of_list`.
    """
    files = files_of_folders(folder, skipped) if labels is None else files_of_list(labels, folder)
    return merged(files, warnings)


def left_out(files: Sequence[LabelledFile]) -> list[LabelledFile]:
    """Every fifth image of each category, for tests; none of a category that has few.

    They are spread over the category's names, which tell when and where pictures were made. An
    image of several categories goes with the first of them.
    """
    by_label: dict[str, list[LabelledFile]] = {}
    for file in files:
        by_label.setdefault(file.labels[0], []).append(file)
    enough = (group for group in by_label.values() if len(group) >= FEWEST_TO_TEST)
    return [file for group in enough for file in group[TEST_EVERY - 1 :: TEST_EVERY]]


class LeftOutImages:
    """The labelled images that a retrofit's calibration leaves out.

    Args:
        folder: as of `labelled_files`.
        labels: the same.
    """

    def __init__(self, folder: Path, labels: Path | None = None) -> None:
        self.folder = folder
        self._files = left_out(labelled_files(folder, labels, [], []))
        self.categories = tuple(dict.fromkeys(file.labels[0] for file in self._files))

    def images(self, category: str) -> Iterator[Image.Image]:
        """The images of a category, RGB; unusable ones were listed by the calibration.

        One of several categories is the first one's alone.
        """
        for file in self._files:
            if file.labels[0] == category:
                with suppress(ImageError):
                    yield open_image(file.path)


def open_files(
    files: Iterable[LabelledFile], *, skip_bad: bool, skipped: list[str]
) -> Iterator[tuple[tuple[str, ...], Image.Image]]:
    """(labels, image) pairs.

    Raises:
        ImageError: an unusable image, unless `skip_bad`; then it is listed in `skipped`.
        InputError: behind the last one, for a category of which no image could be opened.
    """
    table = CategoryTable(None)
    for file in files:
        try:
            image = open_image(file.path)
        except ImageError as error:
            if not skip_bad:
                raise ImageError(
                    f"{error}. With --skip-bad the calibration goes on without it."
                ) from error
            skipped.append(str(error))
            table.add_all(file.labels, skipped=1)
            continue
        table.add_all(file.labels, read=1)
        yield file.labels, image
    table.finish(skipped)


def _of_csv(line: str, where: str) -> tuple[str, list[str]]:
    try:
        [row] = csv.reader(io.StringIO(line), strict=True)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{where}: not a line of CSV ({error})") from error
    name, *labels = row
    return name, [label.strip() for label in labels]


def _of_json(line: str, where: str) -> tuple[str, list[str]]:
    try:
        entry = parse_json(line, where)
    except ConfigError as error:
        raise DataError(str(error)) from error
    keys = {"image", "labels"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise DataError(f'{where}: expected {{"image": path, "labels": [...]}}')
    name, labels = entry["image"], entry["labels"]
    if (
        not isinstance(name, str)
        or not isinstance(labels, list)
        or not all(isinstance(label, str) for label in labels)
    ):
        raise DataError(f"{where}: expected a text for 'image' and a list of texts for 'labels'")
    return name, labels


def _checked(labels: list[str], where: str) -> tuple[str, ...]:
    if not 1 <= len(labels) <= MAX_LABELS or len(set(labels)) < len(labels):
        raise DataError(f"{where}: expected 1 to {MAX_LABELS} different labels, got {labels[:5]}")
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            raise DataError(
                f"{where}: expected labels of 1 to {MAX_LABEL} printable characters, got "
                f"{label[:20]!r}"
            )
    if NEUTRAL in labels and len(labels) > 1:
        raise DataError(f"{where}: {NEUTRAL!r} stands alone, got {labels}")
    return tuple(labels)


def _inside(root: Path, name: str, where: str) -> Path:
    try:
        path = (root / name).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: {name!r} is no path ({error})") from error
    if not path.is_relative_to(root):
        raise DataError(f"{where}: {name!r} leaves the images' folder {root}")
    if not there:
        raise DataError(f"{where}: there is no image {name!r} in {root}")
    return path
