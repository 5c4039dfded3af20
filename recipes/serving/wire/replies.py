"""Answers as OpenAI's API has them, with the guard's verdicts beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from vqguard.judging.verdict import Reason, Verdict

AMBIGUOUS = "ambiguous"
"""The category of a file that shows more than one picture."""
FinishReason = Literal["stop", "length", "content_filter"]


class PictureVerdict(BaseModel):
    """What the guard says about one picture of a request."""

    index: int
    """Which of the request's pictures, from 0."""
    flagged: bool
    action: str
    """What was done: "none", "report", "warn", "blank", "refuse", "raise"."""
    category: str | None = None
    """Of a picture that exceeds a threshold, as all that follows."""
    score: float | None = None
    threshold: float | None = None
    region: dict[str, Any] | None = None
    """Where, if the judge can say."""
    also: list[str] | None = None
    """Other categories whose thresholds it exceeds."""
    ambiguous: str | None = None
    """Why the file shows more than one picture, where that was asked for."""


class GuardReply(BaseModel):
    """The guard's part of an answer."""

    map_version: str
    pictures: list[PictureVerdict]


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class Choice(BaseModel):
    """The only choice."""

    index: int = 0
    message: Message
    logprobs: None = None
    finish_reason: FinishReason


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    """`chat.completion`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    guard: GuardReply


class Delta(BaseModel):
    """What a piece of a stream adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The only choice of a piece."""

    index: int = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Chunk(BaseModel):
    """`chat.completion.chunk`: a piece of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    guard: GuardReply | None = None

    def event(self) -> str:
        """The piece as a server-sent event."""
        absent = {name for name in ("usage", "guard") if getattr(self, name) is None}
        body = self.model_dump(mode="json", exclude=absent)
        for choice in body["choices"]:
            choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
        return server_event(body)


class ModerationResult(BaseModel):
    """What is said about one input."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[str]]
    guard: GuardReply


class ModerationReply(BaseModel):
    """`/v1/moderations`. The categories are those of the guard's safety map."""

    id: str
    model: str
    results: list[ModerationResult]


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vqguard"


class ModelList(BaseModel):
    """`/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """`/health`."""

    status: Literal["ok"]
    model: str
    map_version: str


def server_event(body: Any) -> str:
    """`data: …` with its empty line; `body` is plain JSON, or the text that ends a stream."""
    text = body if isinstance(body, str) else json.dumps(body)
    return f"data: {text}\n\n"


def guard_reply(verdicts: Sequence[Verdict], map_version: str, *, reasons: bool) -> GuardReply:
    """The guard's part of an answer.

    Without `reasons` it says which pictures are flagged and no more: scores help whoever searches
    for a picture that passes.
    """
    return GuardReply(
        map_version=map_version,
        pictures=[
            picture_verdict(index, verdict, reasons=reasons)
            for index, verdict in enumerate(verdicts)
        ],
    )


def picture_verdict(index: int, verdict: Verdict, *, reasons: bool) -> PictureVerdict:
    """One picture's verdict, ready for JSON."""
    reason = verdict.reason
    known = {} if reason is None or not reasons else reason_reply(reason)
    return PictureVerdict(index=index, flagged=verdict.flagged, action=verdict.action, **known)


def reason_reply(reason: Reason) -> dict[str, Any]:
    """Why a picture is flagged, as plain values."""
    region = reason.region
    return {
        "category": reason.category,
        "score": reason.score,
        "threshold": reason.threshold,
        "region": None if region is None else dataclasses.asdict(region),
        "also": list(reason.also),
    }
