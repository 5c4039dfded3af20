"""Eval mode for the length of a block, on modules that other threads use at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()
_HELD: dict[nn.Module, int] = {}
"""Modules that were in training mode, with the number of blocks that hold them in eval mode."""


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these modules (not their children) are in eval mode; afterwards each is as it was.

    Blocks of several threads may overlap: the last one to end puts the modes back. Whoever trains
    the same modules in another thread meanwhile trains them in eval mode.
    """
    held: list[nn.Module] = []
    with _LOCK:
        for module in modules:
            if module.training or module in _HELD:
                _HELD[module] = _HELD.get(module, 0) + 1
                module.training = False
                held.append(module)
    try:
        yield
    finally:
        if held:
            with _LOCK:
                for module in held:
                    _HELD[module] -= 1
                    if not _HELD[module]:
                        del _HELD[module]
                        module.training = True
