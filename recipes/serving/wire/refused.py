"""A refusal in the place of an engine's answer, whole or streamed."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from vqguard.recipes.serving.wire.forwarded import ForwardedRequest
from vqguard.recipes.serving.wire.replies import (
    ChatReply,
    Choice,
    Chunk,
    ChunkChoice,
    Delta,
    GuardReply,
    Message,
    Usage,
    server_event,
)


def refused_answer(
    name: str,
    created: int,
    request: ForwardedRequest,
    text: str,
    guard: GuardReply,
    headers: Mapping[str, str],
) -> Response:
    """As the engine would answer: as many choices as were asked for, streamed if that was.

    Args:
        name: the answer's id.
        created: when, in seconds since 1970.
        request: what was asked.
        text: the refusal.
        guard: why.
        headers: of the answer.
    """
    usage = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)
    numbers = range(request.n or 1)
    if not request.stream:
        choices = [
            Choice(index=n, message=Message(content=text), finish_reason="content_filter")
            for n in numbers
        ]
        reply = ChatReply(
            id=name,
            created=created,
            model=request.model,
            choices=choices,
            usage=usage,
            guard=guard,
        )
        return JSONResponse(reply.model_dump(mode="json"), headers=dict(headers))
    said = [ChunkChoice(index=n, delta=Delta(role="assistant", content=text)) for n in numbers]
    ends = [ChunkChoice(index=n, delta=Delta(), finish_reason="content_filter") for n in numbers]
    chunks = [
        Chunk(id=name, created=created, model=request.model, choices=said),
        Chunk(id=name, created=created, model=request.model, choices=ends, guard=guard),
    ]
    if request.stream_options is not None and request.stream_options.include_usage:
        chunks.append(Chunk(id=name, created=created, model=request.model, choices=[], usage=usage))
    events = "".join(chunk.event() for chunk in chunks) + server_event("[DONE]")
    return Response(events, media_type="text/event-stream", headers=dict(headers))
