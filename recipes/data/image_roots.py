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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, BinaryIO, Generic, TypeVar, cast

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
"""Bytes of all headers of one member of a tar; a path has at most 4 096."""
MAX_TAR_HEADERS, HEADERS_FREE = 4096, 4 * 2**20
"""Bytes of headers that a tar has for each member on average, beyond so many bytes: a megabyte of
extended headers takes `tarfile` more than a second."""
MAX_RATIO, RATIO_FREE = 100, 16 * 2**20
"""Times that a zip's member may be smaller than what it unpacks to, beyond so many bytes: images
are compressed already, and what unpacks to thousands of times its size costs seconds a member."""
_PIECE = 2**16
_UTF8 = 0x800  # the flag of a zip's name that is UTF-8; without it, it is code page 437
_TAR_BLOCK = 512
_TAR_CALLS = 16  # reads and seeks of `tarfile` for one block of a tar, at most
Size = tuple[int, int]
"""A picture's width and height in pixels, as its file has them."""
_Entry = TypeVar("_Entry")


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

    def check(self, name: str, *, decode: bool = False) -> Size:
        """The size of a picture, if `name` is there and its header is an image's.

        A broken body shows up when the picture is decoded, and is named then; with `decode` that
        is done here.

        Raises:
            DataError, ImageError: it is not.
        """
        if decode:
            return self.decoded(name).size
        with self.stream(name) as stream:
            return check_header(stream, self.where(name))

    def opener(self, name: str) -> NamedPicture:
        """A function that opens the image, RGB, as `vqguard.images.open_image` does."""
        return NamedPicture(self, name)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.path}: {name}"

    def decoded(self, name: str) -> Image.Image:
        """The picture, RGB, as `vqguard.images.open_image` opens it."""
        return decode_image(io.BytesIO(self.read(name)), self.where(name))


@dataclass(frozen=True)
class NamedPicture:
    """Opens a picture of a root; equal to whatever opens the same one."""

    root: ImageRoot
    name: str

    def __call__(self) -> Image.Image:
        return self.root.decoded(self.name)


class FolderRoot(ImageRoot):
    """A folder. Names must stay inside it, and so must symbolic links unless they are followed.

    Args:
        path: the folder.
        follow_links: take whatever files its links lead to, as in a snapshot of the Hugging Face
            hub, or in a folder of data that lie on several disks.
    """

    def __init__(self, path: Path, *, follow_links: bool = False) -> None:
        self.path = path
        self.follow_links = follow_links
        self._resolved = path.resolve()

    def stream(self, name: str) -> BinaryIO:
        file = self._file(name)
        try:
            return open_regular(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the image {file} cannot be read ({error}). Check --images."
            ) from error

    def holds(self, name: str) -> bool:
        """Whether a file of this name is in the folder."""
        try:
            self._file(name)
        except DataError:
            return False
        return True

    def where(self, name: str) -> str:
        return str(self.path / name)

    def decoded(self, name: str) -> Image.Image:
        return open_image(self._file(name))

    def _file(self, name: str) -> Path:
        try:
            file = self._place(name)
            there = file.is_file()
            if not there and "\\" in name:
                file = self._place(_forward(name))
                there = file.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, half a character, link loops
            raise DataError(f"the image path {name!r} is none ({error}). Check --data.") from error
        if not file.is_relative_to(self._resolved):
            named = Path(os.path.normpath(self._resolved / name)).is_relative_to(self._resolved)
            remedy = " by a symbolic link; --follow-links permits that" if named else ""
            raise DataError(f"the image path {name!r} leaves the image root {self.path}{remedy}.")
        if not there:
            raise DataError(f"the image {file} is missing. Check --images.")
        return file

    def _place(self, name: str) -> Path:
        """The file of a name, which must lie in the folder."""
        place = self._resolved / name
        return Path(os.path.normpath(place)) if self.follow_links else place.resolve()


class _Member(io.RawIOBase):
    """A file inside an archive as a file of its own, which closes `source` with it."""

    def __init__(self, source: Any, size: int) -> None:
        super().__init__()
        self._source = source
        self._size = size
        self._at = 0

    @abstractmethod
    def _fill(self, view: memoryview, at: int) -> int:
        """Read into `view`, which ends where the member does at the latest; returns bytes read."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = self._fill(memoryview(buffer)[: max(0, self._size - self._at)], self._at)
        self._at += count
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


class _ArchiveRoot(ImageRoot, Generic[_Entry]):
    """An archive whose names are read once; nothing but its own plain files is found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, _Entry | str] = {}
        """What a name stands for, or why it is refused."""

    def _add(self, name: str, entry: _Entry | str) -> None:
        inner = str(PurePosixPath(_forward(name)))
        if inner in self._files:
            entry = "is there more than once, so which one is meant cannot be told"
        self._files[inner] = entry

    def _entry(self, name: str) -> _Entry:
        entry = self._files.get(_inner(name), "is missing")
        if isinstance(entry, str):
            raise DataError(f"{self.path}: {name!r} {entry}. Check --images.")
        return entry


@dataclass(frozen=True)
class _Extent:
    """A file's place inside a tar, in bytes."""

    start: int
    size: int


class _Window(_Member):
    """A part of a tar."""

    def __init__(self, tar: BinaryIO, place: _Extent) -> None:
        super().__init__(tar, place.size)
        self._start = place.start

    def _fill(self, view: memoryview, at: int) -> int:
        self._source.seek(self._start + at)
        count: int = self._source.readinto(view)
        return count


class TarRoot(_ArchiveRoot[_Extent]):
    """An uncompressed tar: its headers are read once, its files by their place."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is no tar, is compressed, or is cut off."""
        super().__init__(path)
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
            most_bytes=MAX_TAR_HEADER,  # of the first member, which is read at once
            size=size,
        )
        place = count = 0
        left = HEADERS_FREE
        with tarfile.open(fileobj=counted, mode="r:") as archive:
            kept: Any = archive
            while True:
                left += MAX_TAR_HEADERS
                counted.most_bytes = allowed = min(left, MAX_TAR_HEADER)
                if (member := archive.next()) is None:
                    break
                left -= allowed - counted.most_bytes
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
                if member.isdir():
                    continue
                if member.isfile() and member.sparse is None:
                    self._add(member.name, _Extent(place, member.size))
                else:
                    self._add(member.name, "is a link or a special file, which are not followed")

    @property
    def names(self) -> list[str]:
        """The plain files that can be read, in the archive's order."""
        return [name for name, entry in self._files.items() if isinstance(entry, _Extent)]

    @property
    def refused(self) -> dict[str, str]:
        """Members that are not read, and why."""
        return {name: why for name, why in self._files.items() if isinstance(why, str)}

    def stream(self, name: str) -> BinaryIO:
        place = self._entry(name)
        if place.size > MAX_BYTES:
            raise DataError(_too_large(self.path, name, place.size))
        return io.BufferedReader(_Window(open_regular(self.path), place))


class _Unpacked(_Member):
    """A zip's member, which keeps what it unpacked.

    `zipfile` unpacks again for each step back, and decoders step back for each entry of a header.
    """

    def __init__(self, packed: IO[bytes], size: int) -> None:
        super().__init__(packed, size)
        self._kept = io.BytesIO()

    def _fill(self, view: memoryview, at: int) -> int:
        have = self._kept.seek(0, io.SEEK_END)
        wanted = min(at + len(view), self._size)
        while have < wanted and (piece := self._source.read(min(wanted - have, _PIECE))):
            have += self._kept.write(piece)
        self._kept.seek(at)
        return self._kept.readinto(view)


def _names_of(member: zipfile.ZipInfo) -> tuple[str, ...]:
    """A member's name; also in UTF-8 where the zip does not say that it is, and it can be."""
    if member.flag_bits & _UTF8 or member.filename.isascii():
        return (member.filename,)
    try:
        return (member.filename, member.filename.encode("cp437").decode("utf-8"))
    except UnicodeError:
        return (member.filename,)


class ZipRoot(_ArchiveRoot[zipfile.ZipInfo]):
    """A zip: its directory is read once a process; each file is unpacked in memory."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is no zip or whose directory is damaged."""
        super().__init__(path)
        self._archives: dict[int, zipfile.ZipFile] = {}
        members = self._archive().infolist()
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{path}: more than {MAX_MEMBERS:,} files. Split it.")
        for member in members:
            if not member.filename.endswith("/"):  # is_dir() stumbles over a name of no letters
                entry = "is encrypted" if member.flag_bits & 1 else member
                for name in _names_of(member):
                    self._add(name, entry)

    def stream(self, name: str) -> BinaryIO:
        member = self._entry(name)
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


def image_root(path: Path, *, follow_links: bool = False) -> ImageRoot:
    """The folder, zip or tar at `path`; `follow_links` as of `FolderRoot`.

    Raises:
        DataError: for anything else.
    """
    if path.is_dir():
        return FolderRoot(path, follow_links=follow_links)
    if not path.is_file():
        raise DataError(f"{path}: no such folder. Give the images' root with --images.")
    if path.suffix.lower() == ".zip":
        return ZipRoot(path)
    if path.suffix.lower() == ".tar":
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


def _has_drive(name: str) -> bool:
    return "\\" in name and bool(PureWindowsPath(name).drive)


def _forward(name: str) -> str:
    """A name with the separators that archives and most data have, if Windows wrote it."""
    return name.replace("\\", "/")


def _inner(name: str) -> str:
    """A member's name as asked for; one that points outside is no member's name."""
    pure = PurePosixPath(_forward(name))
    if pure.is_absolute() or ".." in pure.parts or _has_drive(name):
        raise DataError(f"the image path {name!r} leaves the image root.")
    return str(pure)


def _too_large(path: Path, name: str, size: int) -> str:
    return f"{path}: {name!r} is {size:,} bytes unpacked, at most {MAX_BYTES:,} are accepted."
