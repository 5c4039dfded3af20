"""Runs a piece of Python in a process of its own, with limits that the system enforces."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

_REPORT = """
import resource as _resource
print("peak", _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss // 1024 - _before)
"""
_START = """
import resource as _resource
_before = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss // 1024
"""
ADDRESSES = 12 * 2**30
"""Bytes of address space: what goes wild meets this and not the machine's memory."""


def run_limited(
    imports: str, program: str, *arguments: object, seconds: float, megabytes: int
) -> str:
    """What `program` prints, after `imports`, whose time and memory do not count.

    It must end by itself within `seconds` of processor time, and its memory must not grow by more
    than `megabytes`.
    """
    limit = int(seconds) + 30  # imports take their time on a busy machine

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))

    clock = "import time as _time\n_start = _time.process_time()\n"
    spent = "print('seconds', _time.process_time() - _start)\n"
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(["import sys", imports, clock, _START, program, spent, _REPORT]),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        preexec_fn=limits,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=20 * limit,
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-2000:]}"
    *printed, took, peak = run.stdout.splitlines()
    if float(took.split()[1]) > seconds:
        pytest.fail(f"took {took}, at most {seconds} are allowed")
    if int(peak.split()[1]) > megabytes:
        pytest.fail(f"{peak} MB, at most {megabytes} are allowed")
    return "\n".join(printed)
