"""An answer's text piece by piece, so that the pieces make up the whole answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vqguard.recipes.serving.answering.rows import cut_at

_HALF = "\ufffd"
"""What a part of a character is decoded as."""


class SafeText:
    """Text that no later token changes: half characters and half stops are held back."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self.decode = decode
        self.stops = stops
        self._tokens: list[int] = []
        self._sent = ""

    def add(self, token: int) -> str:
        """What can be sent after one more token; often empty."""
        self._tokens.append(token)
        text, stopped = cut_at(self.decode(self._tokens), self.stops)
        if not stopped:
            text = text.rstrip(_HALF)
            text = text[: len(text) - self._held(text)]
        return self._send(text)

    def rest(self, text: str) -> str:
        """What is missing of the whole answer."""
        return self._send(text)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):  # a decoder that rewrites what it wrote
            return ""
        piece, self._sent = text[len(self._sent) :], text
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop."""
        longest = max(map(len, self.stops), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self.stops)
            ),
            0,
        )
