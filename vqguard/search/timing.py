"""How long searches take, told apart on a machine that is busy with other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ROUNDS, _MOST_ROUNDS = 5, 15
_CPU = torch.device("cpu")


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `work` takes once, on `device`.

    On a GPU between two events in its stream, with the pauses of the host. Else this thread's
    processor time where it does all the work, or the time of the clock on the wall.
    """
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def seconds(work: Callable[[], Any], device: torch.device = _CPU) -> float:
    """The better of two runs on `device`, after one that warms up."""
    return min([seconds_of(work, device) for _ in range(3)][1:])


def alternated(
    ways: Mapping[str, Callable[[], Any]],
    settled: Callable[[dict[str, list[float]]], bool],
    device: torch.device = _CPU,
) -> dict[str, list[float]]:
    """Seconds of each way, round by round; in every round each runs once, in turn.

    One round warms up. There are 5 others, and then more until `settled`, 15 at the most.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_MOST_ROUNDS + 1):
        if number > _ROUNDS and settled(taken):
            break
        for name, way in ways.items():
            passed = seconds_of(way, device)
            if number:
                taken[name].append(passed)
    return taken


def quartiles(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Of the rounds' ratios: lower quartile, median, upper quartile."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
