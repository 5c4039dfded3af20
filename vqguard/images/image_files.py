"""Which files are images: by what is in them, not by what they are called."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from PIL import Image

from vqguard.bounded import open_regular
from vqguard.errors import ImageError
from vqguard.images.opening import FORMATS

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""Names that claim to be images: such a file is handed on even if nothing in it looks like one,
so that opening it says what is wrong."""

PREFIX = 16
"""Bytes that Pillow shows a decoder to ask whether a file is one of its own."""

NOT_AN_IMAGE = "not an image"
OTHER_FORMAT = "an image of a format that is not read here; convert it to PNG"
NOT_REGULAR = "not a regular file"
LINKED_AGAIN = "linked again: "

# HEIF and AVIF, and the two forms of JPEG XL: other programs open them, Pillow by itself does not.
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1")
_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL ")

LeftOut = Callable[[Path, str], None]


def looks_like_image(path: Path) -> bool:
    """Whether a regular file begins as a file of `FORMATS` does, for the decoders themselves.

    Raises:
        OSError: it cannot be read.
    """
    return _begins_like_image(_beginning(path))


def is_of_other_format(path: Path) -> bool:
    """Whether a regular file is an image that other programs open, and `open_image` does not.

    Raises:
        OSError: it cannot be read.
    """
    return _begins_otherwise(_beginning(path), path.suffix)


def why_no_image(name: str, beginning: bytes) -> str | None:
    """Why a file of an archive is none that `open_image` opens; None for one that is handed to it.

    Args:
        name: of the file; one that ends in `SUFFIXES` claims to be an image.
        beginning: its first `PREFIX` bytes, or all of them.
    """
    suffix = PurePosixPath(name).suffix
    if suffix.lower() in SUFFIXES or _begins_like_image(beginning):
        return None
    return OTHER_FORMAT if _begins_otherwise(beginning, suffix) else NOT_AN_IMAGE


def _begins_like_image(prefix: bytes) -> bool:
    Image.init()
    # What the decoders ask is asked here too, so nothing that opens as an image is missed.
    decoders = [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]
    return any(accept is None or bool(accept(prefix)) for _, accept in decoders)


def _begins_otherwise(prefix: bytes, suffix: str) -> bool:
    if (prefix[4:8] == b"ftyp" and prefix[8:12] in _BRANDS) or prefix.startswith(_SIGNATURES):
        return True
    Image.init()
    for name, (_, accept) in Image.OPEN.items():
        if name in FORMATS:
            continue
        if accept is None:  # such decoders look at all of a file
            if Image.EXTENSION.get(suffix.lower()) == name:
                return True
            continue
        with suppress(Exception):  # written for longer beginnings
            if accept(prefix):
                return True
    return False


def _beginning(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(PREFIX)


def iter_images(
    paths: Path | str | Iterable[Path | str], left_out: LeftOut | None = None
) -> Iterator[Path]:
    """Image files, in the order of the arguments and sorted inside each folder.

    Folders are searched recursively, hidden files and links to folders too. A file there is an
    image if it begins like one (`looks_like_image`), whatever it is called; if its name ends in
    `SUFFIXES` (any case); and if it cannot be looked at. Anything that is named itself is handed on
    unchanged, so that `open_image` reports a missing or unsuitable file by name.

    Each folder is searched once: a link to one that was searched already, such as a link back to
    its own parent, is left out.

    Args:
        paths: a file, a folder, or several of them.
        left_out: called with each path that is not handed on, and why: `NOT_AN_IMAGE`,
            `OTHER_FORMAT`, `NOT_REGULAR` or, for a folder that was searched before, `LINKED_AGAIN`
            followed by the path that led there. None where nobody needs to know.

    Raises:
        ImageError: if a folder cannot be listed (skipping it would leave images unjudged).
    """
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if _is_folder(path):
            files = sorted(files_below(path, left_out), key=lambda file: file.parts)
            yield from (file for file in files if _is_wanted(file, left_out))
        else:
            yield path


def files_below(folder: Path, left_out: LeftOut | None) -> Iterator[Path]:
    """Whatever is no folder in a folder and below, unsorted.

    Links to folders wait until all real folders are done, so that a file that can be reached in two
    ways is called by its own name.
    """
    searched: dict[tuple[int, int], Path] = {}
    folders, links = [folder], deque[Path]()
    while folders or links:
        parent = folders.pop() if folders else links.popleft()
        try:
            place = parent.stat()
            first = searched.setdefault((place.st_dev, place.st_ino), parent)
            if first is not parent:
                _report(left_out, parent, f"{LINKED_AGAIN}{first}")
                continue
            with os.scandir(parent) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ImageError(f"{parent}: cannot list this folder: {error.strerror}") from error
        for entry in listed:
            path = parent / entry.name
            if not _is_folder(path):
                yield path
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append(path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # opening it as an image says why
        return False


def why_left_out(file: Path) -> str | None:
    """Why `iter_images` leaves a file of a folder out; None for one that it hands on.

    One of `NOT_AN_IMAGE`, `OTHER_FORMAT` and `NOT_REGULAR`.
    """
    if file.suffix.lower() in SUFFIXES:
        return None
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for a writer
            return NOT_REGULAR
        if looks_like_image(file):
            return None
        return OTHER_FORMAT if is_of_other_format(file) else NOT_AN_IMAGE
    except OSError:
        return None  # what cannot be looked at may be an image: opening it says why


def _is_wanted(file: Path, left_out: LeftOut | None) -> bool:
    reason = why_left_out(file)
    if reason is not None:
        _report(left_out, file, reason)
    return reason is None


def _report(left_out: LeftOut | None, path: Path, reason: str) -> None:
    if left_out is not None:
        left_out(path, reason)
