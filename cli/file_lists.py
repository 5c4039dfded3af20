"""Lists of file names that other programs write, as `--files-from` takes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vqguard.errors import InputError

LARGEST_LIST = 256 * 2**20
"""Bytes of a list: some million names, all kept in memory."""


def read_list(source: Path) -> list[Path]:
    """The names in a file, or on stdin for `-`: ended by NUL if there is one in it (`find
    -print0`), else one a line. Empty ones are left out.

    Raises:
        InputError: the list cannot be read, or is larger than `LARGEST_LIST`.
    """
    try:
        if source == Path("-"):
            content = sys.stdin.buffer.read(LARGEST_LIST + 1)
        else:
            with source.open("rb") as file:
                content = file.read(LARGEST_LIST + 1)
    except OSError as error:
        raise InputError(
            f"{source}: the list of files cannot be read ({error.strerror}); check the path"
        ) from error
    if len(content) > LARGEST_LIST:
        raise InputError(
            f"{source}: the list of files is longer than {LARGEST_LIST:,} bytes; split it"
        )
    names = content.split(b"\0" if b"\0" in content else b"\n")
    return [Path(os.fsdecode(name)) for name in names if name]
