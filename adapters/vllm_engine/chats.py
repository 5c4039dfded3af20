"""Conversations of one `LLM.chat`, whose pictures are looked at together.

vLLM renders one after the other, and only then knows what it shows. Here some are rendered before
the first of them is prepared, and stand in the line meanwhile.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

from vqguard.adapters.vllm_engine.waiting import NOBODY, line_of, pictures_of

TOGETHER = 16
"""Conversations whose pictures are in memory at a time."""


class Conversations:
    """Those of one call, some of which are rendered together when the first is asked for."""

    def __init__(self, conversations: Sequence[Any]) -> None:
        self._left = deque(conversations)
        self._rendered: deque[Any] = deque()

    def next(self, llm: Any, **options: Any) -> Any:
        """What the engine is given for the next one."""
        if not self._rendered:
            several = [self._left.popleft() for _ in range(min(TOGETHER, len(self._left)))]
            with ExitStack() as stack:
                token = _RENDERING.set(stack)
                try:
                    self._rendered += llm._preprocess_chat(several, **options)
                finally:
                    _RENDERING.reset(token)
        return self._rendered.popleft()


_CONVERSATIONS: ContextVar[Conversations | None] = ContextVar("vqguard_conversations", default=None)
_RENDERING: ContextVar[ExitStack | None] = ContextVar("vqguard_rendering", default=None)
"""Open while conversations are rendered together: their requests leave the line at its end."""


def have_chats_wait(renderer_class: Any, offline_class: Any) -> None:
    """Have the conversations of `LLM.chat` stand in the line, as `have_requests_wait` others.

    vLLM renders each by itself, and what it shows is known only then.
    """
    add, render = offline_class._add_chat_requests, offline_class._preprocess_chat_one
    complete = renderer_class._apply_prompt_extras
    if getattr(add, "vqguard", False):
        return

    @functools.wraps(add)
    def _add_chat_requests(self: Any, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if line_of(self.renderer) is NOBODY:
            return add(self, messages, *args, **kwargs)
        several = [messages] if messages and isinstance(messages[0], dict) else messages
        token = _CONVERSATIONS.set(Conversations(several))
        try:
            return add(self, messages, *args, **kwargs)
        finally:
            _CONVERSATIONS.reset(token)

    @functools.wraps(render)
    def _preprocess_chat_one(self: Any, conversation: Any, **options: Any) -> Any:
        several = _CONVERSATIONS.get()
        if several is None:
            return render(self, conversation, **options)
        return several.next(self, **options)

    @functools.wraps(complete)
    def _apply_prompt_extras(self: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        # the last thing that is done to prompts before the first of them is prepared
        done = complete(self, prompts, *args, **kwargs)
        stack = _RENDERING.get()
        if stack is not None:
            stack.enter_context(line_of(self).standing(pictures_of(prompts)))
        return done

    _add_chat_requests.vqguard = True  # type: ignore[attr-defined]
    offline_class._add_chat_requests = _add_chat_requests
    offline_class._preprocess_chat_one = _preprocess_chat_one
    renderer_class._apply_prompt_extras = _apply_prompt_extras
