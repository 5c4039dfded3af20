"""A NeMo Guardrails action that has every picture of a conversation judged."""

from __future__ import annotations

import os
from typing import Any

import httpx
from nemoguardrails.actions import action
from nemoguardrails.context import raw_llm_request

PATH = "/beta/litellm_basic_guardrail_api"  # takes messages as they are, and says BLOCKED or NONE
SECONDS = 120.0
# where events have what was said
SAID = ("final_transcript", "text", "content", "script", "final_script")


@action(name="vqguard_pictures")  # type: ignore[untyped-decorator,unused-ignore]
async def vqguard_pictures(events: list[dict[str, Any]]) -> str:
    """Why the conversation must not go on; empty if it may.

    What cannot be judged, and a server that cannot be asked, are reasons too.
    """
    shown = [event[key] for event in events for key in SAID if isinstance(event.get(key), list)]
    messages = [{"role": "user", "content": content} for content in shown]
    forwarded = raw_llm_request.get()  # what the model is given; none where events were asked for
    messages += forwarded if isinstance(forwarded, list) else []
    asked = {"input_type": "request", "structured_messages": messages}
    try:
        async with httpx.AsyncClient(timeout=SECONDS) as client:
            answer = await client.post(os.environ["VQGUARD"] + PATH, json=asked)
        answer.raise_for_status()
        verdict = answer.json()
    except Exception as error:
        return f"the pictures were not judged ({type(error).__name__})"
    return "" if verdict.get("action") == "NONE" else str(verdict.get("blocked_reason"))
