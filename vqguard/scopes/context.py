"""What a `with` block puts in force for its own thread or task, and for no other.

A context variable alone is inherited by the tasks and threads that are started inside the block and
may outlive it: a value counts only while its block is open.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(eq=False)
class _Entry(Generic[T]):
    value: T
    open: bool = True


class Opened(Generic[T]):
    """The values of the open blocks of this context, outermost first."""

    def __init__(self, name: str) -> None:
        self._here: ContextVar[tuple[_Entry[T], ...]] = ContextVar(name, default=())
        self._anywhere: tuple[_Entry[T], ...] = ()
        self._lock = threading.Lock()

    @contextmanager
    def put(self, value: T) -> Iterator[T]:
        """Inside, `value` is the last of `values()`. Blocks nest.

        A generator that waits inside a block may be closed after blocks that began later, or in
        another context: an event loop closes those of a cancelled task in a task of its own.
        """
        entry = _Entry(value)
        self._here.set((*self._here.get(), entry))
        with self._lock:
            self._anywhere = (*self._anywhere, entry)
        try:
            yield value
        finally:
            entry.open = False
            with self._lock:
                self._anywhere = _without(self._anywhere, entry)
            self._here.set(_without(self._here.get(), entry))

    def values(self) -> list[T]:
        """The values in force here.

        Gradient checkpointing recomputes a forward pass in threads of autograd's own, which have no
        context: there every open block counts.
        """
        entries = self._here.get()
        if not entries and self._anywhere and _in_autograd_thread():
            entries = self._anywhere
        return [entry.value for entry in entries if entry.open]


def _without(entries: tuple[_Entry[T], ...], entry: _Entry[T]) -> tuple[_Entry[T], ...]:
    return tuple(kept for kept in entries if kept is not entry)


def _in_autograd_thread() -> bool:
    """Whether a backward pass runs here in a thread that Python did not start."""
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return foreign and torch._C._current_graph_task_id() != -1
