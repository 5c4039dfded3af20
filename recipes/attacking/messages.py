"""What an attack's message says, under a model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vqguard.adapters.later_turn_target import Turns
from vqguard.recipes.data.chat import ChatTemplate


def picture_prompt(processor: Any, text: str, pictures: int = 1) -> str:
    """A text behind so many pictures, ready to be answered."""
    template = ChatTemplate(processor)
    if pictures == 1:
        return template.prompt(text, picture=True)
    return template.asked([_asked(text, pictures)])


def turns_of(
    processor: Any, question: str, requests: Sequence[str], openings: Sequence[str]
) -> Turns:
    """A question about a picture, its answer, and then a request without a picture."""
    template = ChatTemplate(processor)
    opened = _asked(question, 1)

    def second(number: int, answer: str) -> str:
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        return template.asked([opened, said, _asked(requests[number], 0)])

    first = template.asked([opened])
    return Turns([first] * len(requests), second, openings)


def _asked(text: str, pictures: int) -> dict[str, Any]:
    shown = [{"type": "image"}] * pictures
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
