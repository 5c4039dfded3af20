"""Where a data file's images are: a folder, a zip or a tar, read in place and one at a time.

Names inside an archive come from outside. Nothing is ever unpacked to disk; a member is found by its
exact name or not at all, must be a plain file, must be the only one of its name, and may hold no
more than `MAX_BYTES` however it is compressed.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from vqguard.errors import DataError, ImageError
from vqguard.images import FORMATS, decode_image, open_image

MAX_BYTES = 256 * 2**20
"""Largest image file in an archive, unpacked."""
MAX_MEMBERS = 20_000_000
"""Most files in an archive; their names are kept in memory."""


class ImageRoot(ABC):
    """Images by name. Opening reads one file and keeps nothing open, so workers may share a root."""

    path: Path

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's bytes. Raises `DataError` for a name that is not there or is refused."""

    def check(self, name: str) -> None:
        """Raise `DataError` or `ImageError` unless `name` is there and begins like an image."""
        _probe(io.BytesIO(self.read(name)), f"{self.path}: {name}")

    def opener(self, name: str) -> Callable[[], Image.Image]:
        """A function that opens the image, RGB, as `vqguard.images.open_image` does."""
        return lambda: decode_image(io.BytesIO(self.read(name)), f"{self.path}: {name}")


class FolderRoot(ImageRoot):
    """A folder. Names must stay inside it, links included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resolved = path.resolve()

    def read(self, name: str) -> bytes:
        return self._file(name).read_bytes()

    def check(self, name: str) -> None:
        # headers only: a truncated body shows up when the picture is decoded, named by open_image
        file = self._file(name)
        with file.open("rb") as stream:
            _probe(stream, str(file))

    def opener(self, name: str) -> Callable[[], Image.Image]:
        file = self._file(name)
        return lambda: open_image(file)

    def _file(self, name: str) -> Path:
        file = (self.path / name).resolve()
        if not file.is_relative_to(self._resolved):
            raise DataError(f"the image path {name!r} leaves the image root {self.path}.")
        if not file.is_file():
            raise DataError(f"the image {file} is missing. Check --images.")
        return file


@dataclass(frozen=True)
class _Extent:
    """A file's place inside a tar, in bytes."""

    start: int
    size: int


class TarRoot(ImageRoot):
    """An uncompressed tar: its headers are read once, its files by their place."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is no tar, is compressed, or is cut off."""
        self.path = path
        self._files: dict[str, _Extent | str] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._add(member)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(
                f"{path}: cannot be read as an uncompressed tar ({error}). A compressed one has no "
                "places to jump to: unpack it once with gunzip, or make a zip."
            ) from error
        size = path.stat().st_size
        if any(isinstance(x, _Extent) and x.start + x.size > size for x in self._files.values()):
            raise DataError(f"{path}: ends before its last file does. Copy it again.")

    @property
    def names(self) -> list[str]:
        """The plain files that can be read, in the archive's order."""
        return [name for name, place in self._files.items() if isinstance(place, _Extent)]

    def read(self, name: str) -> bytes:
        place = self._files.get(_inner(name))
        if not isinstance(place, _Extent):
            raise DataError(f"{self.path}: {name!r} {place or 'is missing'}. Check --images.")
        if place.size > MAX_BYTES:
            raise DataError(_too_large(self.path, name, place.size))
        with self.path.open("rb") as stream:
            stream.seek(place.start)
            return stream.read(place.size)

    def _add(self, member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        if len(self._files) >= MAX_MEMBERS:
            raise DataError(f"{self.path}: more than {MAX_MEMBERS:,} files. Split it.")
        name = str(PurePosixPath(member.name))
        if name in self._files:
            self._files[name] = "is there more than once, so which one is meant cannot be told"
        elif not member.isfile() or member.sparse is not None:
            self._files[name] = "is a link or a special file, which are not followed"
        else:
            self._files[name] = _Extent(member.offset_data, member.size)


class ZipRoot(ImageRoot):
    """A zip: its directory is read once; each file is unpacked in memory, up to the limit."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is no zip or whose directory is damaged."""
        self.path = path
        self._files: dict[str, zipfile.ZipInfo | str] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a zip ({error}). Copy it again.") from error
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path}: more than {MAX_MEMBERS:,} files. Split it.")
        for member in members:
            name = str(PurePosixPath(member.filename))
            if member.is_dir():
                continue
            if name in self._files:
                self._files[name] = "is there more than once, so which one is meant cannot be told"
            elif member.flag_bits & 1:
                self._files[name] = "is encrypted"
            else:
                self._files[name] = member

    def read(self, name: str) -> bytes:
        member = self._files.get(_inner(name))
        if not isinstance(member, zipfile.ZipInfo):
            raise DataError(f"{self.path}: {name!r} {member or 'is missing'}. Check --images.")
        if member.file_size > MAX_BYTES:
            raise DataError(_too_large(self.path, name, member.file_size))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:
                found = stream.read(MAX_BYTES + 1)  # the directory may lie about the size
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
            raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error
        except Exception as error:  # zlib.error and its kin derive from nothing shared
            raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error
        if len(found) > MAX_BYTES:
            raise DataError(_too_large(self.path, name, len(found)))
        return found


def image_root(path: Path) -> ImageRoot:
    """The folder, zip or tar at `path`. Raises `DataError` for anything else."""
    if path.is_dir():
        return FolderRoot(path)
    if not path.is_file():
        raise DataError(f"{path}: no such folder. Give the images' root with --images.")
    if path.suffix == ".zip":
        return ZipRoot(path)
    if path.suffix == ".tar":
        return TarRoot(path)
    raise DataError(f"{path}: expected a folder, a .zip or an uncompressed .tar of images.")


def _inner(name: str) -> str:
    """A member's name as asked for; one that points outside is no member's name."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise DataError(f"the image path {name!r} leaves the image root.")
    return str(pure)


def _too_large(path: Path, name: str, size: int) -> str:
    return f"{path}: {name!r} is {size:,} bytes unpacked, at most {MAX_BYTES:,} are accepted."


def _probe(stream: io.BufferedIOBase, where: str) -> None:
    try:
        with Image.open(stream, formats=FORMATS):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{where} is not a readable image ({error}).") from error
