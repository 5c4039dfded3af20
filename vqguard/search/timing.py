"""How long searches take, told apart on a machine that is busy with other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROUNDS, _MOST_ROUNDS = 5, 15


def _clock() -> Callable[[], float]:
    """This thread's processor time where it does all the work, else the clock on the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds(work: Callable[[], Any]) -> float:
    """The better of two runs, after one that warms up."""
    clock, taken = _clock(), []
    for _ in range(3):
        start = clock()
        work()
        taken.append(clock() - start)
    return min(taken[1:])


def alternated(
    ways: Mapping[str, Callable[[], Any]], settled: Callable[[dict[str, list[float]]], bool]
) -> dict[str, list[float]]:
    """Seconds of each way, round by round; in every round each runs once, in turn.

    One round warms up. There are 5 others, and then more until `settled`, 15 at the most.
    """
    clock = _clock()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_MOST_ROUNDS + 1):
        if number > _ROUNDS and settled(taken):
            break
        for name, way in ways.items():
            start = clock()
            way()
            if number:
                taken[name].append(clock() - start)
    return taken


def quartiles(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Of the rounds' ratios: lower quartile, median, upper quartile."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
