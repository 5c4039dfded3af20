"""The entries of a JSON list, or of JSONL, one at a time: a file of any size, little memory.

Each entry's place in the file is known once it was read, so that it can be read again by itself.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vqguard.bounded import open_regular, read_bytes
from vqguard.errors import ConfigError, DataError
from vqguard.recipes.data.records.decoding import decode_text
from vqguard.text_files import json_value, parse_json

MAX_ENTRY = 16 * 2**20
"""Characters of one entry."""
MAX_UTF16 = 2**30
"""Bytes of a data file in UTF-16, which is kept in memory."""
_PIECE = 2**20
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_COCO = re.compile(r'\{\s*"(info|licenses|images|annotations|type)"\s*:')
_COCO_REMEDY = (
    "; COCO's own files (info, images, annotations) are not read: write an entry for each image, "
    "{id, image, conversations}"
)
_CUT = 32
"""So near to the end of what was read, an error may be that it ends there."""


class Entry(NamedTuple):
    """A value with its place in the file, in bytes."""

    value: Any
    start: int
    end: int


class JsonEntries:
    """The entries of a file. Pickles as its path.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _open(path) as file:
            mark = file.read(3)
            self.size = os.fstat(file.fileno()).st_size
            """Of the file, in bytes."""
        self._start = 3 if mark == codecs.BOM_UTF8 else 0
        self._content: bytes | None = None
        if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            self._content = _utf16(path)
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __iter__(self) -> Iterator[Entry]:
        """All entries in order.

        Raises:
            DataError: what is there is no list of entries.
        """
        with self._opened() as file:
            file.seek(self._start)
            window = _Window(file, self.path, self._start)
            try:
                first = window.peek()
                if first == "{":
                    yield from _lines(window)
                elif first == "[":
                    yield from _items(window)
                else:
                    raise window.error("it begins with neither '[' nor '{'")
            except UnicodeDecodeError as error:
                raise window.error(str(error)) from error

    def at(self, start: int, end: int) -> Any:
        """The value in this place.

        Raises:
            DataError: there is none any more.
        """
        if self._content is not None:
            raw = self._content[start:end]
        else:
            if self._file is None:
                self._file = _open(self.path)
            raw = os.pread(self._file.fileno(), end - start, start)
        try:
            return parse_json(raw.decode(), str(self.path), strict=False)
        except (ConfigError, UnicodeDecodeError) as error:
            raise DataError(
                f"{error}. The file was changed since it was checked: start the run again."
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self._content is not None:
            yield BytesIO(self._content)
        else:
            with _open(self.path) as file:
                yield file


EXPECTED = "expected a JSON list of entries, or an entry a line"


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}. Check --data.") from error


def _utf16(path: Path) -> bytes:
    """The file's text in UTF-8."""
    try:
        return decode_text(read_bytes(path, MAX_UTF16, DataError)).encode()
    except UnicodeError as error:
        raise DataError(f"{path}: {EXPECTED}; {error}.") from error


class _Window:
    """The text of a file from where it is read on."""

    def __init__(self, file: BinaryIO, path: Path, start: int) -> None:
        self.path = path
        self.text = ""
        self.place = 0
        """In `text`; what lies before it is done with."""
        self.byte = start
        """Of the file, at `place`."""
        self.ended = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> None:
        """Read on, by as much as is left already: an entry is begun a few times at most."""
        left = len(self.text) - self.place
        if left > MAX_ENTRY:
            hint = _COCO_REMEDY if _COCO.match(self.text, self.place) else ""
            raise self.error(f"the entry there does not end within {MAX_ENTRY:,} characters{hint}")
        piece = self._file.read(max(_PIECE, left))
        self.ended = not piece
        self.text = self.text[self.place :] + self._decoder.decode(piece, final=self.ended)
        self.place = 0

    def take(self, end: int) -> None:
        """Go on at `end` of `text`."""
        self.byte += len(self.text[self.place : end].encode())
        self.place = end

    def peek(self) -> str:
        """The next character that is not blank, which is not taken; nothing at the end."""
        while True:
            found = _NOT_BLANK.search(self.text, self.place)
            self.take(found.start() if found else len(self.text))
            if found or self.ended:
                return found[0] if found else ""
            self.more()

    def error(self, problem: str) -> DataError:
        """What is wrong here."""
        return DataError(f"{self.path}: {EXPECTED}; at byte {self.byte:,}: {problem}.")


def _lines(window: _Window) -> Iterator[Entry]:
    number = 0
    while window.peek():
        number += 1
        while (end := window.text.find("\n", window.place)) < 0 and not window.ended:
            window.more()
        line = window.text[window.place : end if end >= 0 else None]
        start = window.byte
        try:
            value = parse_json(line, f"{window.path}, line {number}", strict=False)
        except ConfigError as error:
            raise DataError(f"{window.path}: {EXPECTED}; {error}.") from error
        window.take(window.place + len(line))
        yield Entry(value, start, window.byte)


def _items(window: _Window) -> Iterator[Entry]:
    window.take(window.place + 1)
    if window.peek() != "]":
        yield _value(window)
        while window.peek() == ",":
            window.take(window.place + 1)
            window.peek()
            yield _value(window)
    if window.peek() != "]":
        raise window.error("expected ',' or the list's end")
    window.take(window.place + 1)
    if window.peek():
        raise window.error("expected nothing behind the list")


def _value(window: _Window) -> Entry:
    """The value at the window's place, which is taken."""
    while True:
        try:
            value, end = json_value(window.text, window.place)
        except json.JSONDecodeError as error:
            cut = error.pos > len(window.text) - _CUT or error.msg.startswith("Unterminated")
            if window.ended or not cut:
                raise window.error(str(error)) from error
        except (ConfigError, ValueError) as error:
            raise window.error(str(error)) from error
        else:
            if end < len(window.text) or window.ended:  # a number may go on behind what was read
                start = window.byte
                window.take(end)
                return Entry(value, start, window.byte)
        window.more()
