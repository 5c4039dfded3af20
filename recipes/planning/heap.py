"""What the C library's allocator holds while tensors come and go: a model of glibc's `malloc`.

On a CPU a process takes more than its live tensors: freed blocks stay in the heap, and a hole is of
use only to a block that fits. How much that is follows from the order and the sizes of blocks,
which the step on the meta device gives (`step_peak`). The rules, from glibc 2.36's
`malloc/malloc.c`:

- a block of the mmap threshold (first 128 KiB) or more is mapped by itself and given back when
  freed; freeing one of up to 32 MiB raises the threshold to its size, the trim threshold to twice
  that;
- another block takes the smallest hole that is large enough, or else the top of the heap;
- a freed block joins the holes beside it; the top is given back when it is larger than the trim
  threshold.

Small blocks' bins, and arenas of other threads, are left out: tensors are large, and on a CPU the
backward pass runs in the thread that asked for it.
"""

from __future__ import annotations

import bisect

PAGE = 4096
FIRST_THRESHOLD = 128 * 2**10
LARGEST_THRESHOLD = 32 * 2**20
_HEADER, _ROUND = 8, 16
ALIGNMENT = 64
"""PyTorch asks for blocks at multiples of this (`c10/core/alignment.h`)."""

Event = tuple[int, int]
"""(block, size): a block of so many bytes is asked for; (block, 0): it is freed."""


class Heap:
    """glibc's main heap and its mapped blocks, in bytes. `peak` is the largest `resident`."""

    def __init__(self) -> None:
        self.peak = 0
        self._threshold = FIRST_THRESHOLD
        self._trim = FIRST_THRESHOLD
        self._top = 0  # end of the last block in the heap
        self._touched = 0  # end of what the system has given
        self._mapped = 0
        self._blocks: dict[int, tuple[int | None, int]] = {}
        self._holes: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}  # start -> size
        self._ends: dict[int, int] = {}  # end -> start

    @property
    def resident(self) -> int:
        """Bytes that the process holds."""
        return self._touched + self._mapped

    def take(self, block: int, size: int) -> None:
        """A block of `size` bytes, under a number of the caller's."""
        whole = _rounded(size + _HEADER, _ROUND)
        asked = whole + ALIGNMENT + 2 * _ROUND  # what an aligned block is cut from
        if asked >= self._threshold:
            mapped = _rounded(asked, PAGE)
            self._mapped += mapped
            self._blocks[block] = (None, mapped)
        else:
            self._blocks[block] = self._from_heap(asked, whole)
        self.peak = max(self.peak, self.resident)

    def _from_heap(self, asked: int, whole: int) -> tuple[int, int]:
        place = bisect.bisect_left(self._holes, (asked, -1))
        if place == len(self._holes):
            start = self._top
            self._top += whole
            self._touched = max(self._touched, self._top)
            return start, whole
        size, start = self._holes[place]
        self._fill(start)
        if size > whole:
            self._dig(start + whole, size - whole)
        return start, whole

    def free(self, block: int) -> None:
        """Give a block back to the heap, or to the system."""
        place, size = self._blocks.pop(block)
        if place is None:
            self._mapped -= size
            if self._threshold < size <= LARGEST_THRESHOLD:
                self._threshold, self._trim = size, 2 * size
            return
        start = place
        if start in self._ends:
            before = self._ends[start]
            size += self._fill(before)
            start = before
        if start + size in self._starts:
            size += self._fill(start + size)
        if start + size < self._top:
            self._dig(start, size)
            return
        self._top = start
        if self._touched - self._top >= self._trim:
            self._touched = self._top

    def _dig(self, start: int, size: int) -> None:
        bisect.insort(self._holes, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _fill(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._holes.pop(bisect.bisect_left(self._holes, (size, start)))
        return size


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
