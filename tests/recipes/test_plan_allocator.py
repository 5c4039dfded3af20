"""The model of glibc's heap: what it keeps, and that it keeps nothing it has no reason to."""

from __future__ import annotations

import random

import pytest

from vqguard.recipes.planning.heap import FIRST_THRESHOLD, LARGEST_THRESHOLD, Heap

MB = 2**20


def test_what_fits_a_hole_goes_there() -> None:
    heap = Heap()
    for block in range(4):
        heap.take(block, 50_000)
    held = heap.resident
    heap.free(1)
    heap.take(9, 40_000)
    assert heap.resident == held
    heap.take(10, 60_000)  # the hole is too small
    assert heap.resident > held


def test_large_blocks_are_given_back_and_raise_the_threshold() -> None:
    heap = Heap()
    heap.take(1, 4 * MB)
    assert heap.resident == pytest.approx(4 * MB, rel=0.01)
    heap.free(1)
    assert heap.resident == 0
    # from now on such a block is of the heap, and what lies above it keeps it there
    heap.take(2, 3 * MB)
    heap.take(3, 10_000)
    heap.free(2)
    assert heap.resident > 3 * MB


def test_the_largest_blocks_never_stay() -> None:
    heap = Heap()
    for turn in range(3):
        heap.take(turn, 2 * LARGEST_THRESHOLD)
        heap.free(turn)
        assert heap.resident == 0


def test_a_long_lived_block_behind_a_step_keeps_the_step_s_memory() -> None:
    """How optimiser states that are made behind the first step's activations cost memory."""
    heap = Heap()
    heap.take(0, 8 * MB)
    heap.free(0)  # the threshold is 8 MB now
    for block in range(1, 9):
        heap.take(block, 4 * MB)
    heap.take(100, 100_000)
    for block in range(1, 9):
        heap.free(block)
    assert heap.resident > 32 * MB
    heap.free(100)
    assert heap.resident < 1 * MB


@pytest.mark.parametrize("seed", range(5))
def test_resident_is_at_least_what_lives_and_all_comes_back(seed: int) -> None:
    generator = random.Random(seed)
    heap = Heap()
    sizes: dict[int, int] = {}
    for block in range(600):
        size = generator.choice([1_000, 30_000, FIRST_THRESHOLD, MB, 5 * MB])
        heap.take(block, size)
        sizes[block] = size
        if generator.random() < 0.6:
            gone = generator.choice(sorted(sizes))
            heap.free(gone)
            del sizes[gone]
        assert heap.resident >= sum(sizes.values())
    peak = heap.peak
    for block in sizes:
        heap.free(block)
    assert heap._top == 0
    assert heap._holes == []
    assert heap.resident < 2 * LARGEST_THRESHOLD  # at most what the trim threshold leaves
    assert heap.peak == peak
