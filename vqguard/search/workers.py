"""Plain threads that share the rows of a batch, for loops that release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

_LEAST_ROWS = 16
"""For fewer rows another thread does not pay."""

Share = Callable[..., None]
"""share(work, *arguments) runs work(first, last, *arguments) over all rows, and returns then."""


@contextmanager
def shared_rows(rows: int) -> Iterator[Share]:
    """A `Share` for as many threads as torch may use, of which this one is the first.

    The threads live as long as the context: ones that were kept would be missing in a forked
    process.
    """
    workers = max(1, min(torch.get_num_threads(), rows // _LEAST_ROWS))
    if workers == 1:
        yield lambda work, *arguments: work(0, rows, *arguments)
        return
    edges = [rows * part // workers for part in range(workers + 1)]
    with ThreadPoolExecutor(workers - 1) as pool:

        def share(work: Any, *arguments: Any) -> None:
            own, *others = pairwise(edges)
            jobs = [pool.submit(work, *piece, *arguments) for piece in others]
            work(*own, *arguments)
            for job in jobs:
                job.result()

        yield share
