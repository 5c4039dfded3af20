"""How a chat template writes conversations of one shape: the texts differ, the rest does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Span = tuple[int, int]
Shape = tuple[tuple[str, ...], ...]
"""The types of each message's parts."""


class Form(NamedTuple):
    """How a template writes conversations of one shape."""

    literals: tuple[str, ...]
    """What stands before each text."""
    rest: str
    """What stands behind the last."""
    end: str
    """How much of that the template itself does not write."""
    margins: tuple[Span, ...]
    """Characters of each answer's span before and behind the answer."""

    def filled(self, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]] | None:
        """The text with these messages in it, and the answers' spans.

        None for an answer that begins or ends with blanks, which templates treat in several ways.
        """
        pieces: list[str] = []
        spans: list[Span] = []
        length = 0
        literals, margins = iter(self.literals), iter(self.margins)
        for message in messages:
            for text in texts_of([message]):
                literal = next(literals)
                pieces += (literal, text)
                length += len(literal)
                if message["role"] == "assistant":
                    if text != text.strip():
                        return None
                    before, behind = next(margins)
                    spans.append((length - before, length + len(text) + behind))
                length += len(text)
        return "".join([*pieces, self.rest]), spans


def texts_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The texts of messages in the form that chat templates take, in order."""
    return [p["text"] for message in messages for p in message["content"] if p["type"] == "text"]
