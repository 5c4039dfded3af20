"""Ratios of ways to do one thing, timed alternately in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Ways = Mapping[str, Callable[[], Any]]


def alternate(ways: Ways, rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each way in each of `rounds` rounds; in every round each runs once, in turn.

    With one thread these are the process's CPU seconds, which other work on the machine disturbs
    through the caches alone; with more, wall time, which needs a quiet machine.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm):
        for name, way in ways.items():
            start = clock()
            way()
            if number >= warm:
                seconds[name].append(clock() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def shown(above: list[float], below: list[float]) -> str:
    """`median (quartiles)` for a table."""
    low, middle, high = ratio(above, below)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def machine() -> str:
    """Processor, threads, versions, and how busy the machine is with other work."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpu.exists():
        for line in cpu.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"{name} ({', '.join(units)}), {os.cpu_count()} cores, torch {torch.__version__} with"
        f" {torch.get_num_threads()} threads; load average {load}"
    )
