"""Requests whose pictures are there before their turn has come.

Process 0 prepares one request at a time. Those behind it stand in a line, so that their pictures
can be looked at together with its own: a tower and a search cost less for sixteen pictures at once
than for each of them. Nobody waits for companions, and a request that is not in the line is looked
at by itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Waiting:
    """A request in the line."""

    def __init__(self, data: Any) -> None:
        self.data = data
        """Its `multi_modal_data`, which nobody has read yet."""
        self.content: tuple[str, ...] = ()
        """What its pictures were, when they were looked at ahead of its turn."""
        self.prepared: Any = None
        """What came of that, for pictures of this content alone."""
        self.by_itself = False
        """Whether it is left to its own turn: looking at it, or at others with it, failed."""


class Line:
    """Who waits, in order of arrival. Several threads may stand in it; one takes the turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Waiting] = []

    @contextmanager
    def standing(self, requests: Iterable[Any]) -> Iterator[None]:
        """Inside, requests with this `multi_modal_data` wait, or have had their turn."""
        mine = [Waiting(data) for data in requests]
        with self._lock:
            self._waiting += mine
        try:
            yield
        finally:
            left = set(map(id, mine))
            with self._lock:
                self._waiting = [other for other in self._waiting if id(other) not in left]

    @contextmanager
    def turn(self, data: Any) -> Iterator[None]:
        """Inside, it is the turn of the request with this very `multi_modal_data`, if it waited."""
        with self._lock:
            request = next((other for other in self._waiting if other.data is data), None)
            if request is not None:
                self._waiting.remove(request)
        token = _TURN.set(request)
        try:
            yield
        finally:
            _TURN.reset(token)

    def behind(self) -> list[Waiting]:
        """Those whose turn is still to come, the next one first."""
        with self._lock:
            return list(self._waiting)


_TURN: ContextVar[Waiting | None] = ContextVar("vqguard_turn", default=None)


def whose_turn() -> Waiting | None:
    """The request that this thread prepares; None where it did not wait in a line."""
    return _TURN.get()


def have_requests_wait(renderer_class: Any, offline_class: Any) -> None:
    """Have vLLM's requests stand in the line of their processor, and take their turns.

    `renderer_class`: vLLM's `BaseRenderer`, of a server or not; `offline_class`: what `LLM` adds
    requests with, all of which are known before the first. Does nothing the second time.
    """
    prepare, arrive = renderer_class._process_multimodal, renderer_class._process_tokens_async
    add = offline_class._add_completion_requests
    if getattr(prepare, "vqguard", False):
        return

    @functools.wraps(prepare)
    def _process_multimodal(self: Any, prompt: Any, mm_data: Any, *args: Any, **kwargs: Any) -> Any:
        with line_of(self).turn(mm_data):
            return prepare(self, prompt, mm_data, *args, **kwargs)

    @functools.wraps(arrive)
    async def _process_tokens_async(self: Any, prompt: Any, **kwargs: Any) -> Any:
        with line_of(self).standing(pictures_of([prompt])):
            return await arrive(self, prompt, **kwargs)

    @functools.wraps(add)
    def _add_completion_requests(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        several = prompts if isinstance(prompts, (list, tuple)) else [prompts]
        with line_of(self.renderer).standing(pictures_of(several)):
            return add(self, prompts, *args, **kwargs)

    _process_multimodal.vqguard = True  # type: ignore[attr-defined]
    renderer_class._process_multimodal = _process_multimodal
    renderer_class._process_tokens_async = _process_tokens_async
    offline_class._add_completion_requests = _add_completion_requests


NOBODY = Line()
"""Where requests of models without a guard stand: nobody looks at them."""


def line_of(renderer: Any) -> Line:
    """The line of a renderer's processor; `NOBODY` where no guard is."""
    line: Line = getattr(renderer.mm_processor, "line", NOBODY)
    return line


def pictures_of(prompts: Iterable[Any]) -> list[Any]:
    """The `multi_modal_data` of those that have any."""
    given = (prompt.get("multi_modal_data") for prompt in prompts if isinstance(prompt, Mapping))
    return [data for data in given if data]
