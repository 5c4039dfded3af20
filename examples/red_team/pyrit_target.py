"""A PyRIT target for a served guard: its attacks may show pictures.

The server may be of another machine, and PyRIT's packages stay apart from vqguard's:

    vqguard serve runs/mine
    python examples/red_team/pyrit_target.py http://127.0.0.1:8000 photo.png "What is it?"

`VQGuardTarget` is what an attack of PyRIT is given; the lines below send one prompt by hand.
"""

from __future__ import annotations

import asyncio
import base64
import mimetypes
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
from pyrit.models import Message, MessagePiece, construct_response_from_request
from pyrit.prompt_target import PromptTarget
from pyrit.prompt_target.common.target_capabilities import TargetCapabilities
from pyrit.prompt_target.common.target_configuration import TargetConfiguration
from pyrit.setup import IN_MEMORY, initialize_pyrit_async

SECONDS = 300.0
KINDS = ({"text"}, {"image_path"}, {"text", "image_path"})


class VQGuardTarget(PromptTarget):  # type: ignore[misc]
    """A guarded model behind `vqguard serve` or `vqguard gateway`."""

    _DEFAULT_CONFIGURATION = TargetConfiguration(
        capabilities=TargetCapabilities(
            supports_multi_turn=True,
            supports_multi_message_pieces=True,
            supports_editable_history=True,
            supports_system_prompt=True,
            input_modalities=frozenset(map(frozenset, KINDS)),
        )
    )

    def __init__(self, *, address: str, model: str, new_tokens: int = 128) -> None:
        super().__init__(endpoint=address, model_name=model)
        self._new_tokens = new_tokens

    async def _send_prompt_to_target_async(
        self, *, normalized_conversation: list[Message]
    ) -> list[Message]:
        body = {
            "model": self._model_name,
            "messages": [_message(message) for message in normalized_conversation],
            "max_tokens": self._new_tokens,
        }
        async with httpx.AsyncClient(base_url=self._endpoint, timeout=SECONDS) as client:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        # a refusal is an answer, which scorers read; who refused stands beside it
        return [
            construct_response_from_request(
                request=normalized_conversation[-1].message_pieces[0],
                response_text_pieces=[choice["message"]["content"]],
                prompt_metadata={"finish_reason": choice["finish_reason"]},
            )
        ]


def _message(message: Message) -> dict[str, Any]:
    parts = [_part(piece) for piece in message.message_pieces]
    return {"role": message.message_pieces[0].role, "content": parts}


def _part(piece: MessagePiece) -> dict[str, Any]:
    if piece.converted_value_data_type == "text":
        return {"type": "text", "text": piece.converted_value}
    path = Path(piece.converted_value)
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


async def main(address: str, picture: str, question: str) -> None:
    await initialize_pyrit_async(memory_db_type=IN_MEMORY)
    model = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
    target = VQGuardTarget(address=address, model=model)
    one = str(uuid.uuid4())
    pieces = [
        MessagePiece(
            role="user", original_value=value, original_value_data_type=kind, conversation_id=one
        )
        for value, kind in ((picture, "image_path"), (question, "text"))
    ]
    (answer,) = await target.send_prompt_async(message=Message(message_pieces=pieces))
    piece = answer.message_pieces[0]
    print(f"{piece.prompt_metadata['finish_reason']}: {piece.converted_value}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} ADDRESS PICTURE QUESTION")
    asyncio.run(main(*sys.argv[1:]))
