"""Lists of file names that other programs write, as `--files-from` takes them."""

from __future__ import annotations

import os
import re
import sys
from itertools import islice
from pathlib import Path

from vqguard.errors import InputError

LARGEST_LIST = 256 * 2**20
"""Bytes of a list."""
MOST_NAMES = 1_000_000
"""Names in a list: each takes some 300 bytes while pictures are judged."""


def read_list(source: Path) -> list[Path]:
    """The names in a file, or on stdin for `-`: ended by NUL if there is one in it (`find
    -print0`), else one a line. Empty ones are left out.

    Raises:
        InputError: the list cannot be read, is larger than `LARGEST_LIST` or has more than
            `MOST_NAMES`.
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
    pattern = rb"[^\0]+" if b"\0" in content else rb"[^\n]+"
    names = [
        Path(os.fsdecode(found[0]))
        for found in islice(re.finditer(pattern, content), MOST_NAMES + 1)
    ]
    if len(names) > MOST_NAMES:
        raise InputError(f"{source}: the list names more than {MOST_NAMES:,} files; split it")
    return names
