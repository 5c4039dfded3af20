"""Opening a Hugging Face dataset within limits: first in a process that has them.

Arrow unpacks what a file's headers say, and headers may lie: a page of dictionary indices, or a
compressed buffer, of a few bytes becomes any amount of memory, and `datasets` writes what parquet
unpacks to onto the disk. So a process that the system limits opens a dataset first. What it has
unpacked lies in the cache of `datasets`, from which the caller's process maps it; what ends the
process, a decoder's crash too, ends no other.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vqguard.bounded import open_regular
from vqguard.errors import DataError
from vqguard.recipes.processes import python_command

MAX_MEMORY = 4 * 2**30
"""Bytes that a dataset may take while it is opened. A row group of parquet is unpacked as a whole;
`datasets` writes some hundred rows into one. Enforced by the system, on Linux."""
MAX_RATIO, FREE = 100, 2**24
"""Parquet may unpack to so many times its size, and as many bytes more: what zips may."""
SAVED, PARQUET = "saved", "parquet"
_START = (
    "import runpy\n"
    "runpy.run_module('vqguard.recipes.data.unpacking_program', run_name='__main__')\n"
)


def open_within_limits(kind: str, paths: Sequence[Path], cache: Path | str) -> None:
    """Open a saved dataset (its folder) or parquet files in a process with limits.

    Args:
        kind: `SAVED` or `PARQUET`.
        paths: the folder, or the files.
        cache: where `datasets` unpacks parquet to.

    Raises:
        DataError: it cannot be opened, or not within the limits; with the reason alone.
    """
    unpacked = FREE + MAX_RATIO * sum(map(_size, paths)) if kind == PARQUET else 0
    limits = {"memory": MAX_MEMORY, "unpacked": unpacked, "cache": str(cache)}
    done = subprocess.run(
        python_command(_START, kind, json.dumps(limits), *map(str, paths)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        # the system's allocator asks for no more than is used
        env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
        check=False,
    )
    if done.returncode == 0:
        return
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        said = str(json.loads(last)["reason"])
        reason = _too_large().get(said, said)
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        reason = f"the process that opened it first ended with {done.returncode}, saying: {said}"
    raise DataError(reason)


def _too_large() -> dict[str, str]:
    """What the program's words for too much mean."""
    return {
        "memory": f"it needs more than {MAX_MEMORY / 2**30:.1f} GB of memory to be opened, the "
        "most that is taken; save it with smaller row groups, uncompressed",
        "unpacked": f"it unpacks to more than {MAX_RATIO} times its size and {FREE:,} bytes, the "
        "most that is taken; save it without repeated values, or as JSON",
    }


def _size(path: Path) -> int:
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
