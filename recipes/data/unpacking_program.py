"""The process that `unpacking.py` starts: it opens a dataset within limits, or says why not.

    unpacking_program.py KIND LIMITS PATH...

`LIMITS` is JSON: `memory` and `unpacked` in bytes, the `cache` of `datasets`. What stopped it is
printed as JSON: `{"reason": ...}`, of `memory` and `unpacked` their names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet

try:
    import resource as _resource
except ImportError:  # not on Windows
    resource: Any = None
else:
    resource = _resource


class _TooLargeError(Exception):
    pass


def main(kind: str, limits: dict[str, Any], paths: list[str]) -> int:
    """Open what `paths` name; returns the exit code."""
    _limit_memory(int(limits["memory"]))
    try:
        if kind == "saved":
            datasets.load_from_disk(paths[0], keep_in_memory=False)
        else:
            _count_what_is_unpacked(int(limits["unpacked"]))
            datasets.Dataset.from_parquet(paths, keep_in_memory=False, cache_dir=limits["cache"])
    except Exception as error:
        print(json.dumps({"reason": _reason(error)}))
        return 1
    return 0


def _limit_memory(most: int) -> None:
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _count_what_is_unpacked(most: int) -> None:
    original = Parquet._generate_tables

    def counted(self: Any, *arguments: Any, **named: Any) -> Iterator[tuple[Any, Any]]:
        unpacked = 0
        for key, table in original(self, *arguments, **named):
            unpacked += table.nbytes
            if unpacked > most:
                raise _TooLargeError
            yield key, table

    Parquet._generate_tables = counted


def _reason(error: BaseException) -> str:
    """What stopped it, under whatever `datasets` made of that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _TooLargeError):
            return "unpacked"
        if isinstance(seen, MemoryError):
            return "memory"
        seen = seen.__cause__ or seen.__context__
    return str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]))
