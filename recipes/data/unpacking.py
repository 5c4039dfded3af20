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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vqguard.bounded import open_regular
from vqguard.errors import DataError

MAX_MEMORY = 4 * 2**30
"""Bytes that a dataset may take while it is opened. A row group of parquet is unpacked as a whole;
`datasets` writes some hundred rows into one. Enforced by the system, on Linux."""
MAX_RATIO, FREE = 100, 2**24
"""Parquet may unpack to so many times its size, and as many bytes more: what zips may."""
SAVED, PARQUET = "saved", "parquet"


def open_within_limits(kind: str, paths: Sequence[Path], cache: Path | str) -> None:
    """Open a saved dataset (its folder) or parquet files in a process with limits.

    Args:
        kind: `SAVED` or `PARQUET`.
        paths: the folder, or the files.
        cache: where `datasets` unpacks parquet to.

    Raises:
        DataError: it cannot be opened, or not within the limits; with the reason alone.
    """
    limits = {"memory": MAX_MEMORY, "unpacked": 0, "cache": str(cache)}
    if kind == PARQUET:
        limits["unpacked"] = FREE + MAX_RATIO * sum(map(_size, paths))
    done = subprocess.run(
        [sys.executable, "-m", __name__, kind, json.dumps(limits), *map(str, paths)],
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
        reason = str(json.loads(last)["reason"])
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        reason = f"the process that opened it first ended with {done.returncode}, saying: {said}"
    raise DataError(reason)


def _size(path: Path) -> int:
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _main(kind: str, limits: dict[str, Any], paths: list[str]) -> int:
    _limit_memory(int(limits["memory"]))
    try:
        import datasets  # an extra

        if kind == SAVED:
            datasets.load_from_disk(paths[0], keep_in_memory=False)
        else:
            _unpack(paths, int(limits["unpacked"]), limits["cache"])
    except Exception as error:
        print(json.dumps({"reason": _reason(error, int(limits["memory"]))}))
        return 1
    return 0


def _limit_memory(most: int) -> None:
    try:
        import resource  # not on Windows
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _unpack(files: list[str], most: int, cache: str) -> None:
    from datasets import Dataset  # an extra
    from datasets.packaged_modules.parquet.parquet import Parquet

    original = Parquet._generate_tables

    def counted(self: Any, *arguments: Any, **named: Any) -> Iterator[tuple[Any, Any]]:
        unpacked = 0
        for key, table in original(self, *arguments, **named):
            unpacked += table.nbytes
            if unpacked > most:
                raise _TooLargeError(
                    f"it unpacks to more than {MAX_RATIO} times its size and {FREE:,} bytes, the "
                    "most that is taken; save it without repeated values, or as JSON"
                )
            yield key, table

    Parquet._generate_tables = counted
    Dataset.from_parquet(files, keep_in_memory=False, cache_dir=cache)


class _TooLargeError(Exception):
    pass


def _reason(error: BaseException, memory: int) -> str:
    """What stopped it, under whatever `datasets` made of that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _TooLargeError):
            return str(seen)
        if isinstance(seen, MemoryError):
            return (
                f"it needs more than {memory / 2**30:.1f} GB of memory to be opened, the most that "
                "is taken; save it with smaller row groups, uncompressed"
            )
        seen = seen.__cause__ or seen.__context__
    return str(error)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]))
