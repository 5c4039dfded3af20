"""How long a search takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """The better of two runs, after one that warms up, in CPU time of the process.

    On a machine that is busy with other work, wall time would measure that work.
    """
    taken = []
    for _ in range(3):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken[1:])
