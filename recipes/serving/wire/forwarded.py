"""Requests that a gateway hands on. What is not on this list is refused, not dropped in silence.

Unknown kinds of content (videos, audio, embeddings) and options of an engine's own carry things
that nobody judged, or change how a picture is read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vqguard.recipes.serving.wire.schema import (
    StreamOptions,
    Strict,
    SystemMessage,
    TextPart,
    UserMessage,
)

JSON = dict[str, Any]


class Function(Strict):
    """A call that the model made."""

    name: str
    arguments: str


class ToolCall(Strict):
    """One of an answer's calls."""

    id: str
    type: Literal["function"]
    function: Function


class CallingMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Strict):
    """What a call gave: text."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str


ForwardedMessage = Annotated[
    SystemMessage | UserMessage | CallingMessage | ToolMessage, Field(discriminator="role")
]


class ForwardedRequest(Strict):
    """`POST /v1/chat/completions`, for another engine."""

    model: str
    messages: Annotated[list[ForwardedMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: JSON | None = None
    tools: list[JSON] | None = None
    tool_choice: str | JSON | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    user: str | None = None
