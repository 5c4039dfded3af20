"""Reading files that come from outside, within a bound.

A device, a pipe or a sparse file may never end, and a crafted header may ask for any amount of
memory or number of steps. So files are opened only if they are regular, read only up to a stated
size, and parsed through a stream that counts what the parser asks for.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from vqguard.errors import VQGuardError

_PIECE = 2**20


class ReadLimitError(OSError):
    """A parser asked for more than its stream allows."""


def open_regular(path: Path | str) -> BinaryIO:
    """A file to be read, if it is a regular one; links are followed.

    Decided on what was opened, not on what stood there before; a pipe is not waited for.

    Raises:
        OSError: it is anything else, or cannot be opened.
        ValueError: a path that no file can have (a NUL, a lone surrogate).
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{os.fspath(path)!r} is a folder")
        if not stat.S_ISREG(mode):
            raise OSError(f"{os.fspath(path)!r} is not a regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path | str, most: int, kind: type[VQGuardError]) -> bytes:
    """A whole regular file of at most `most` bytes.

    Raises:
        VQGuardError: of the class `kind`, naming the file: it is no regular one, is larger, or
            cannot be read.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            # one more than allowed: a file may grow while it is read
            content = b"" if size > most else stream.read(most + 1 if size == 0 else size + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise kind(f"cannot read {path}: {reason}; check the path, or copy it again") from error
    if size > most or len(content) > most:
        raise kind(f"{path} is larger than {most:,} bytes, the most that is read of such a file")
    return content


def read_text(path: Path | str, most: int, kind: type[VQGuardError]) -> str:
    """A whole regular file of at most `most` bytes of UTF-8.

    Raises:
        VQGuardError: as `read_bytes`, and for other bytes.
    """
    try:
        return read_bytes(path, most, kind).decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


class CountedStream(io.RawIOBase):
    """A stream that can seek, whose reader may ask for so much and no more.

    Reads are cut to what the file holds, so that no buffer of a claimed size is made. `most_read`
    bounds one read of a number of bytes, `most_bytes` all of those together, `most_calls` the reads
    and seeks; beyond, `ReadLimitError` is raised. `None`: no bound. `size`: of the file in bytes,
    else found by seeking.
    """

    def __init__(
        self,
        stream: BinaryIO,
        *,
        most_calls: int | None = None,
        most_read: int | None = None,
        most_bytes: int | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self._stream = stream
        if size is None:
            here = stream.tell()
            size = stream.seek(0, os.SEEK_END)
            stream.seek(here)
        self.size = size
        self.most_calls, self.most_read, self.most_bytes = most_calls, most_read, most_bytes
        self._at = stream.tell()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place of the next read, in bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; as for any file. Beyond the end nothing is read."""
        self._count()
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if place < 0:
            raise OSError("a place before the start of the file")
        self._at = self._stream.seek(min(place, self.size))
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        """At most `count` bytes; all that is left for None or a negative number."""
        self._count()
        left = max(0, self.size - self._at)
        whole = count is None or count < 0
        count = left if count is None or count < 0 else min(count, left)
        if not whole and self.most_read is not None and count > self.most_read:
            raise ReadLimitError(f"a piece of {count:,} bytes, at most {self.most_read:,} are read")
        if not whole and self.most_bytes is not None:
            self.most_bytes -= count
            if self.most_bytes < 0:
                raise ReadLimitError("more bytes are asked for than such a file needs")
        content = self._stream.read(count)
        self._at += len(content)
        return content

    def readall(self) -> bytes:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; returns how many bytes."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _count(self) -> None:
        if self.most_calls is not None:
            self.most_calls -= 1
            if self.most_calls < 0:
                raise ReadLimitError("its parts are too many or too small to be read")
