"""What a request may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from vqguard.strict import StrictConfig

Positive = Annotated[int, Gt(0)]


@dataclass(frozen=True)
class Limits(StrictConfig):
    """Limits of a server. One request's, but where they say of all."""

    body_bytes: Positive = 20 * 2**20
    """Bytes of the body; pictures in it are a third longer than their files."""
    pictures: Positive = 8
    """Pictures."""
    pixels: Positive = 25_000_000
    """Pixels of all its pictures together."""
    messages: Positive = 256
    """Messages of a conversation."""
    prompt_tokens: Positive = 8192
    """Tokens of the prompt, those of the pictures among them; the model's own limit if it is
    lower."""
    new_tokens: Positive = 512
    """Tokens of the answer, and what is answered at most where a request says nothing."""
    seconds: Annotated[float, Gt(0)] = 120.0
    """From its arrival to the end of its answer. What was answered until then is the answer."""
    body_seconds: Annotated[float, Gt(0)] = 30.0
    """Until its body has arrived."""
    requests: Positive = 64
    """Requests that are served or wait, all together; further ones are sent away with 429."""
    waiting_bytes: Positive = 256 * 2**20
    """Bytes of the bodies of all requests that are served or wait; further ones get a 429."""
    batch: Positive = 16
    """Requests that the model answers at a time."""
