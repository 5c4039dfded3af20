"""Requests as OpenAI's API has them. What is not served is refused by name, never passed over."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Most4 = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """Refuses what it does not know, and guesses no types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageURL(Strict):
    """A picture: a data URI, or an address if the server's operator allows its host."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Taken and not used: the model's image processor decides."""


class TextPart(Strict):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(Strict):
    """What the model is told in advance."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | list[Part]
    name: str | None = None


class AssistantMessage(Strict):
    """An earlier answer, as clients send it back."""

    role: Literal["assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    """The only form of answers."""

    type: Literal["text"]


class ChatRequest(Strict):
    """`POST /v1/chat/completions`.

    Fields that ask for nothing (`n` 1, penalties of 0) are taken; those that ask for what is not
    served are refused.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0, the default, is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Annotated[str, Field(min_length=1, max_length=256)] | Most4 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None


class ModerationRequest(Strict):
    """`POST /v1/moderations`. Pictures are judged; texts are taken, and say nothing here."""

    input: str | list[str] | list[Part]
    model: str | None = None
