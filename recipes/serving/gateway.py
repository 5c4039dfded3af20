"""`vqguard gateway`: pictures are judged on their way to an engine that cannot be changed.

It judges and does not quantise: the engine sees the pictures themselves. What it is sent is the
picture that was judged, pixel by pixel, encoded anew: metadata, other readings of the file and an
engine's keys for it are gone.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from PIL import Image

from vqguard.adapters.runtime.guard_link import link_of
from vqguard.recipes.serving.answering.jobs import Screened
from vqguard.recipes.serving.answering.prompts import picture_urls
from vqguard.recipes.serving.common_routes import CHAT, ERRORS, MODELS, behind_the_door, new_app
from vqguard.recipes.serving.door.admission import App, Receive
from vqguard.recipes.serving.door.request_log import FACTS
from vqguard.recipes.serving.door.waiting import LEFT, LeftError, unless_left
from vqguard.recipes.serving.pictures import open_pictures, origin_of
from vqguard.recipes.serving.screening import screen
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.upstream import Upstream
from vqguard.recipes.serving.wire.forwarded import ForwardedRequest
from vqguard.recipes.serving.wire.refusals import (
    ErrorReply,
    RequestError,
    bad_request,
    too_large,
)
from vqguard.recipes.serving.wire.refused import refused_answer
from vqguard.recipes.serving.wire.replies import guard_reply

SAYS = "judged, not quantised"
"""What a gateway says of itself in each answer."""
_GUARD, _MAP = "x-vqguard", "x-vqguard-map-version"
_UPSTREAM: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": "The engine gave no answer."}
    for status in (502, 504)
}
_ANY: dict[int | str, dict[str, Any]] = {
    200: {"description": "The engine's answer, or a refusal.", "content": {"application/json": {}}}
}


def make_gateway(service: Service, upstream: Upstream) -> App:
    """The ASGI application that judges for `upstream`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await upstream.close()

    app = new_app(service, f"A gateway to another engine: pictures are {SAYS}.", lifespan)

    @app.post(CHAT, responses={**ERRORS, **_UPSTREAM, **_ANY}, response_class=Response)
    async def chat(body: ForwardedRequest, request: Request) -> Response:
        """Judge the pictures of a conversation; hand it on, or refuse."""
        authorization = request.headers.get("authorization")
        return await _forward(
            service, upstream, body, authorization, request.receive, request.scope[FACTS]
        )

    @app.get(MODELS, responses={**_UPSTREAM, **_ANY}, response_class=Response)
    async def models(request: Request) -> Response:
        """The engine's models."""
        authorization = request.headers.get("authorization")
        return await upstream.list(MODELS, authorization, {_GUARD: SAYS})

    return behind_the_door(app, service)


async def _forward(
    service: Service,
    upstream: Upstream,
    request: ForwardedRequest,
    authorization: str | None,
    receive: Receive,
    facts: dict[str, Any],
) -> Response:
    if len(request.messages) > service.limits.messages:
        raise too_large("messages", service.limits.messages, "messages")
    files = await service.files(picture_urls(request.messages))
    origin = origin_of(facts["id"], files)
    opened = partial(open_pictures, files, service.limits)
    screened = await screen(service, opened, origin, receive, "messages")
    flagged = [verdict for verdict in screened.verdicts if verdict.flagged]
    facts |= {"pictures": len(files), "flagged": len(flagged)}
    told = {_GUARD: SAYS, _MAP: screened.map_version}
    if flagged:
        facts["forwarded"] = False
        return _refusal(service, request, screened, told)
    # Opened again: decoded pictures are far larger than files, and many requests wait.
    content = await service.in_thread(partial(_judged_body, request, opened))
    del files, opened
    facts["forwarded"] = True
    asked = upstream.ask(CHAT, content, authorization, told)
    del content
    try:
        return await unless_left(asked, receive)
    except LeftError:
        return Response(status_code=LEFT)


def _judged_body(request: ForwardedRequest, opened: Callable[[], Sequence[Image.Image]]) -> bytes:
    """The request with each picture as it was judged.

    Raises:
        RequestError: 400 for numbers that JSON has not, and for what is too deep.
    """
    left = iter(opened())
    try:
        body = request.model_dump(exclude_unset=True)
        for message in body["messages"]:
            for part in message["content"] if isinstance(message.get("content"), list) else []:
                if part["type"] == "image_url":
                    part["image_url"]["url"] = _canonical(next(left))
        return json.dumps(body, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the request cannot be handed on as JSON ({error})") from error


def _canonical(picture: Image.Image) -> str:
    """A data URI of the pixels alone."""
    content = io.BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(content, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _refusal(
    service: Service, request: ForwardedRequest, screened: Screened, told: dict[str, str]
) -> Response:
    """What is answered in the engine's place: it cannot blank, nor begin with a warning."""
    if any(verdict.action == "raise" for verdict in screened.verdicts):
        guard = guard_reply(screened.verdicts, screened.map_version, reasons=service.reasons)
        raise RequestError(
            400,
            "the request shows a picture whose policy is an error",
            code="content_filter",
            param="messages",
            guard=guard.model_dump(mode="json"),
        )
    return refused_answer(
        f"chatcmpl-{uuid.uuid4().hex}",
        int(time.time()),
        request,
        _refusal_text(service, screened),
        guard_reply(screened.verdicts, screened.map_version, reasons=service.reasons),
        told,
    )


def _refusal_text(service: Service, screened: Screened) -> str:
    """The first flagged picture's own refusal, or the guard's."""
    link = link_of(service.run.model)
    safety_map = service.engine.safety_map
    flagged = next(verdict for verdict in screened.verdicts if verdict.flagged)
    own = link.texts.refusal(safety_map, safety_map.judging.acting(flagged))
    return service.engine.decode(link.refusal_ids if own is None else own)
