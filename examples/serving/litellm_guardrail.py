"""A LiteLLM guardrail that has every picture judged by `vqguard serve` or `vqguard gateway`.

LiteLLM's proxy needs no class for that: its generic guardrail API does (docs/serving.md). This one
is for those who extend it, and it blocks whatever goes wrong. `litellm.yaml` beside this file
starts a proxy with it:

    VQGUARD=http://127.0.0.1:8000 UPSTREAM=http://127.0.0.1:30000/v1 LITELLM_MASTER_KEY=sk-... \\
        litellm --config examples/serving/litellm.yaml
"""

from __future__ import annotations

import os
from typing import Any, Literal

import httpx
from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail

PATH = "/beta/litellm_basic_guardrail_api"
SECONDS = 120.0


class VQGuardGuardrail(CustomGuardrail):  # type: ignore[misc,unused-ignore]
    """Blocks requests with a picture that is flagged, or that could not be judged.

    LiteLLM lists the pictures of any kind of request, whichever API it came by, in `inputs`.
    """

    async def apply_guardrail(
        self,
        inputs: Any,
        request_data: dict[str, Any],
        input_type: Literal["request", "response"],
        logging_obj: Any = None,
    ) -> Any:
        asked = {
            "input_type": input_type,
            "texts": inputs.get("texts"),
            "images": inputs.get("images"),
            "structured_messages": inputs.get("structured_messages"),
        }
        try:
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                answer = await client.post(os.environ["VQGUARD"] + PATH, json=asked)
            answer.raise_for_status()
            verdict = answer.json()
        except Exception as error:  # no verdict, no request
            raise GuardrailRaisedException(
                guardrail_name=self.guardrail_name,
                message=f"its pictures were not judged ({type(error).__name__})",
            ) from error
        if verdict.get("action") != "NONE":
            raise GuardrailRaisedException(
                guardrail_name=self.guardrail_name,
                message=str(verdict.get("blocked_reason")),
                blocked_content=True,
            )
        return inputs
