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
from typing import IO, Any, BinaryIO, cast

from PIL import Image

from vqguard.bounded import CountedStream, open_regular
from vqguard.errors import DataError
from vqguard.images import MAX_FILE, check_header, decode_image, open_image

MAX_BYTES = MAX_FILE
"""Largest image file in an archive, unpacked."""
MAX_MEMBERS = 2_000_000
"""Most members of an archive, folders included; their names are kept in memory, some 0.5 kB each.
Larger sets come in several shards."""
MAX_DIRECTORY = 128 * 2**20
"""Bytes of a zip's directory; an entry has about 100."""
MAX_TAR_HEADER = 2**20
"""Bytes of one extended header of a tar; a path has at most 4 096."""
MAX_RATIO, RATIO_FREE = 100, 16 * 2**20
"""Times that a zip's member may be smaller than what it unpacks to, beyond so many bytes: images
are compressed already, and what unpacks to thousands of times its size costs seconds a member."""
_PIECE = 2**16
_TAR_BLOCK = 512
_TAR_CALLS = 16  # reads and seeks of `tarfile` for one block of a tar, at most


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
            content = read_at_most(stream, MAX_BYTES)
        if content is None:
            raise DataError(_too_large(self.path, name, MAX_BYTES + 1))
        return content

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
        file = self._file(name)
        try:
            return open_regular(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the image {file} cannot be read ({error}). Check --images."
            ) from error

    def where(self, name: str) -> str:
        return str(self.path / name)

    def _decoded(self, name: str) -> Image.Image:
        return open_image(self._file(name))

    def _file(self, name: str) -> Path:
        try:
            file = (self.path / name).resolve()
            there = file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, half a character, link loops
            raise DataError(f"the image path {name!r} is none ({error}). Check --data.") from error
        if not file.is_relative_to(self._resolved):
            raise DataError(f"the image path {name!r} leaves the image root {self.path}.")
        if not there:
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
        self._whole: Any = open_regular(path)
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
        count: int = self._whole.readinto(view)
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
            with open_regular(path) as file:
                self._list(file)
        except DataError:
            raise
        except Exception as error:  # tarfile lets nearly anything out, RecursionError among them
            raise DataError(
                f"{path}: cannot be read as an uncompressed tar ({error}). A compressed one has no "
                "places to jump to: unpack it once with gunzip, or make a zip."
            ) from error

    def _list(self, file: BinaryIO) -> None:
        """Read all headers, each of which takes a block of the file."""
        size = os.fstat(file.fileno()).st_size
        counted = CountedStream(
            file,
            most_calls=_TAR_CALLS * (min(size // _TAR_BLOCK, MAX_MEMBERS) + 64),
            most_read=MAX_TAR_HEADER,
            size=size,
        )
        place = count = 0
        with tarfile.open(fileobj=counted, mode="r:") as archive:
            kept: Any = archive
            while (member := archive.next()) is not None:
                kept.members.clear()  # tarfile would keep all
                count += 1
                if count > MAX_MEMBERS:
                    raise DataError(f"{self.path}: more than {MAX_MEMBERS:,} members. Split it.")
                # tarfile goes where a size leads to: back, or round in a circle
                if member.size < 0 or member.offset_data <= place:
                    raise DataError(
                        f"{self.path}: the size of {member.name!r} is {member.size:,}. Make the "
                        "archive again."
                    )
                place = member.offset_data
                if place + member.size > size and member.isfile():
                    raise DataError(f"{self.path}: ends before its last file does. Copy it again.")
                self._add(member)

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
        name = str(PurePosixPath(member.name))
        if name in self._files:
            self._files[name] = "is there more than once, so which one is meant cannot be told"
        elif not member.isfile() or member.sparse is not None:
            self._files[name] = "is a link or a special file, which are not followed"
        else:
            self._files[name] = _Extent(member.offset_data, member.size)


class _Unpacked(io.RawIOBase):
    """A zip's member as a file that keeps what it unpacked.

    `zipfile` unpacks again for each step back, and decoders step back for each entry of a header.
    """

    def __init__(self, packed: IO[bytes], size: int) -> None:
        super().__init__()
        self._packed = packed
        self._size = size
        self._kept = io.BytesIO()
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        have = self._kept.seek(0, io.SEEK_END)
        wanted = min(self._at + len(buffer), self._size)
        while have < wanted and (piece := self._packed.read(min(wanted - have, _PIECE))):
            have += self._kept.write(piece)
        self._kept.seek(self._at)
        count = self._kept.readinto(buffer)
        self._at += count
        return count

    def close(self) -> None:
        self._packed.close()
        super().close()


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
        packed = min(member.compress_size, self._size)
        if member.file_size > RATIO_FREE + MAX_RATIO * packed:
            raise DataError(
                f"{self.path}: {name!r} unpacks from {packed:,} to {member.file_size:,} bytes, at "
                f"most {MAX_RATIO} times as much is accepted. Unpack it yourself if you trust it."
            )
        try:
            unpacked = self._archive().open(member)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error
        return io.BufferedReader(_Unpacked(unpacked, member.file_size))

    def read(self, name: str) -> bytes:
        try:
            return super().read(name)
        except DataError:
            raise
        except Exception as error:  # zlib.error, lzma.LZMAError ... share no base class
            raise DataError(f"{self.path}: {name!r} cannot be unpacked ({error}).") from error

    def _archive(self) -> zipfile.ZipFile:
        # one a process: forked workers would move one another's place in a shared file
        process = os.getpid()
        if process not in self._archives:
            try:
                file = CountedStream(open_regular(self.path), most_read=MAX_DIRECTORY)
                self._size = file.size
                # its files are read through `_Unpacked`, by pieces
                self._archives = {process: zipfile.ZipFile(cast(BinaryIO, file))}
            except Exception as error:  # zipfile lets nearly anything out of a crafted directory
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


def read_at_most(stream: BinaryIO, most: int) -> bytes | None:
    """What is left of a file; None where that is more than `most` bytes.

    In pieces: a read of so many bytes would take their memory, whatever the file holds.
    """
    pieces: list[bytes] = []
    left = most
    while left >= 0 and (piece := stream.read(_PIECE)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces) if left >= 0 else None


def _inner(name: str) -> str:
    """A member's name as asked for; one that points outside is no member's name."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise DataError(f"the image path {name!r} leaves the image root.")
    return str(pure)


def _too_large(path: Path, name: str, size: int) -> str:
    return f"{path}: {name!r} is {size:,} bytes unpacked, at most {MAX_BYTES:,} are accepted."
