"""LiteLLM's generic guardrail API, as its proxy calls it.

Source: `litellm/types/proxy/guardrails/guardrail_hooks/generic_guardrail_api.py`, 1.110. Newer
versions send more: what is not here is passed over, unlike elsewhere.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vqguard.recipes.serving.wire.replies import GuardReply

SILENT = frozenset(
    {
        "input_audio",
        "input_text",
        "output_text",
        "reasoning",
        "redacted_thinking",
        "refusal",
        "text",
        "thinking",
        "tool_use",
    }
)
"""Kinds of content that show no picture."""


class GuardrailRequest(BaseModel):
    """What a proxy asks about a request, or about an answer."""

    model_config = ConfigDict(extra="ignore")

    input_type: Literal["request", "response"]
    images: list[str] | None = None
    texts: list[str] | None = None
    structured_messages: list[dict[str, Any]] | None = None


class GuardrailReply(BaseModel):
    """`BLOCKED` stops the request, `NONE` lets it go on."""

    action: Literal["BLOCKED", "NONE"]
    blocked_reason: str | None = None
    guard: GuardReply | None = None


def shown(request: GuardrailRequest) -> tuple[list[str], str]:
    """The addresses of all pictures of a request, and a kind of content that may show others.

    A proxy lists pictures in `images`; those that it left in the messages are found there.
    """
    urls = list(request.images or [])
    unknown = ""
    for message in request.structured_messages or []:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image_url":
                given = part.get("image_url")
                url = given.get("url") if isinstance(given, dict) else given
                if isinstance(url, str):
                    urls.append(url)
                    continue
            if not isinstance(kind, str) or kind not in SILENT:
                unknown = str(kind)[:40]
    return list(dict.fromkeys(urls)), unknown
