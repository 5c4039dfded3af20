"""Where a data file's images are: a folder, a zip or a tar, read in place and one at a time.

Names inside an archive come from outside. Nothing is ever unpacked to disk; a member is found by
its exact name or not at all, must be a plain file, must be the only one of its name, and may hold
no more than `MAX_BYTES` however it is compressed.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from PIL import Image

from vqguard.errors import DataError
from vqguard.images import check_header, decode_image, open_image

MAX_BYTES = 256 * 2**20
"""Largest image file in an archive, unpacked."""
MAX_MEMBERS = 20_000_000
"""Most files in an archive; their names are kept in memory."""


class ImageRoot(ABC):
    """Images by name, one at a time. A root may be shared with forked and spawned workers."""

    path: Path

    @abstractmethod
    def stream(self, name: str) -> BinaryIO:
        """A file, to be read.

        Raises:
            DataError: for a name that is not there or is refused.
        """

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            DataError: as `stream`, and for one that cannot be unpacked.
        """
        with self.stream(name) as stream:
            return stream.read()

    def check(self, name: str, *, decode: bool = False) -> None:
        """Raise `DataError` or `ImageError` unless `name` is there and its header is an image's.

        A broken body shows up when the picture is decoded, and is named then; with `decode` that
        is done here.
        """
        if decode:
            self._decoded(name)
            return
        with self.stream(name) as stream:
            check_header(stream, self.where(name))

    def opener(self, name: str) -> Callable[[], Image.Image]:
        """A function that opens the image, RGB, as `vqguard.images.open_image` does."""
        return partial(self._decoded, name)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}: {name}"

    def _decoded(self, name: str) -> Image.Image:
        return decode_image(io.BytesIO(self.read(name)), self.where(name))


class FolderRoot(ImageRoot):
    """A folder. Names must stay inside it, links included."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._resolved = path.resolve()

    def stream(self, name: str) -> BinaryIO:
        return self._file(name).open("rb")

    def where(self, name: str) -> str:
        return str(self.path / name)

    def _decoded(self, name: str) -> Image.Image:
        return open_image(self._file(name))

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


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, place: _Extent) -> None:
        self._whole = path.open("rb", buffering=0)
        self._place = place
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._place.size - self._at)]
        self._whole.seek(self._place.start + self._at)
        count = self._whole.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._whole.close()
        super().close()


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

    def stream(self, name: str) -> BinaryIO:
        place = self._files.get(_inner(name))
        if not isinstance(place, _Extent):
            raise DataError(f"{self.path}: {name!r} {place or 'is missing'}. Check --images.")
        if place.size > MAX_BYTES:
            raise DataError(_too_large(self.path, name, place.size))
        return io.BufferedReader(_Window(self.path, place))

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
    """A zip: its directory is read once a process; each file is unpacked in memory."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is no zip or whose directory is damaged."""
        self.path = path
        self._files: dict[str, zipfile.ZipInfo | str] = {}
        self._archives: dict[int, zipfile.ZipFile] = {}
        members = self._archive().infolist()
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

    def stream(self, name: str) -> BinaryIO:
        member = self._files.get(_inner(name))
        if not isinstance(member, zipfile.ZipInfo):
            raise DataError(f"{self.path}: {name!r} {member or 'is missing'}. Check --images.")
        # zipfile stops at the size that the directory names, whatever comes out of the file
        if member.file_size > MAX_BYTES:
            raise DataError(_too_large(self.path, name, member.file_size))
        try:
            return cast(BinaryIO, self._archive().open(member))
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error

    def read(self, name: str) -> bytes:
        with self.stream(name) as stream:
            try:
                return stream.read()
            except Exception as error:  # zlib.error, lzma.LZMAError ... share no base class
                raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error

    def _archive(self) -> zipfile.ZipFile:
        # one a process: forked workers would move one another's place in a shared file
        process = os.getpid()
        if process not in self._archives:
            try:
                self._archives = {process: zipfile.ZipFile(self.path)}
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise DataError(
                    f"{self.path}: cannot be read as a zip ({error}). Copy it again."
                ) from error
        return self._archives[process]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}


def image_root(path: Path) -> ImageRoot:
    """The folder, zip or tar at `path`.

    Raises:
        DataError: for anything else.
    """
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
