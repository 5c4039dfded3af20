"""`POST /beta/litellm_basic_guardrail_api`: LiteLLM's proxy asks before it calls a model.

What cannot be judged is blocked, with status 200: a proxy may be told to go on at other ones.
"""

from __future__ import annotations

from typing import Any

from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.file_verdicts import judge_files
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.guardrail import GuardrailReply, GuardrailRequest, shown
from vqguard.recipes.serving.wire.refusals import RequestError

_BUSY = 429  # and what is above: the server's own trouble, which a proxy may ask about again


async def guardrail(
    service: Service, request: GuardrailRequest, receive: Receive, facts: dict[str, Any]
) -> GuardrailReply:
    """Judge all pictures of what a proxy forwards.

    Raises:
        RequestError: the server is overloaded or stops.
    """
    urls, unknown = shown(request)
    if unknown:
        return _blocked(f"content of the type {unknown!r} cannot be judged")
    if not urls:
        return GuardrailReply(action="NONE")
    places = [(f"images.{number}", url) for number, url in enumerate(urls)]
    try:
        judged = await judge_files(service, places, receive, facts)
    except RequestError as error:
        if error.status >= _BUSY:
            raise
        return _blocked(f"{error.param or 'images'}: {error}")
    if not judged.flagged:
        return GuardrailReply(action="NONE", guard=judged.reply)
    flagged = [picture for picture in judged.reply.pictures if picture.flagged]
    named = ", ".join(f"image {p.index}: {p.category or 'flagged'}" for p in flagged)
    return GuardrailReply(
        action="BLOCKED", blocked_reason=f"flagged by the guard ({named})", guard=judged.reply
    )


def _blocked(reason: str) -> GuardrailReply:
    return GuardrailReply(action="BLOCKED", blocked_reason=reason)
