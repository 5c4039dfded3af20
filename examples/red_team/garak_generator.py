"""A garak generator for a served guard: its probes may show pictures.

The server may be of another machine, and garak's packages stay apart from vqguard's:

    vqguard serve runs/mine
    python examples/red_team/garak_generator.py http://127.0.0.1:8000 photo.png "What is it?"

`VQGuardServer` is what a harness or a probe of garak is given; the lines below ask it by hand.
"""

from __future__ import annotations

import base64
import mimetypes
import sys
from typing import Any

import httpx
from garak import _config
from garak.attempt import Conversation, Message, Turn
from garak.generators.base import Generator

SECONDS = 300.0


class VQGuardServer(Generator):  # type: ignore[misc]
    """A guarded model behind `vqguard serve` or `vqguard gateway`."""

    generator_family_name = "vqguard"
    modality = {"in": {"text", "image"}, "out": {"text"}}  # noqa: RUF012 - garak's own name
    DEFAULT_PARAMS = {**Generator.DEFAULT_PARAMS, "uri": "http://127.0.0.1:8000"}  # noqa: RUF012

    def __init__(self, name: str = "", config_root: Any = _config, uri: str = "") -> None:
        if uri:  # garak's configuration is for generators of its own package
            self.uri = uri
        self._load_config(config_root)  # once: the base sees that it is done
        super().__init__(name or self._served(), config_root=config_root)

    def _call_model(
        self, prompt: Conversation, generations_this_call: int = 1
    ) -> list[Message | None]:
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [_message(turn) for turn in prompt.turns],
            "max_tokens": self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        answer = self._client().post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        # a refusal is an answer; detectors that ask who refused find it in the notes
        notes = {"finish_reason": choice["finish_reason"]}
        return [Message(text=choice["message"]["content"], notes=notes)]

    def _served(self) -> str:
        """The name of the model that the server has; garak wants it at the start."""
        answer = self._client().get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])

    def _client(self) -> httpx.Client:
        return httpx.Client(base_url=self.uri, timeout=SECONDS)


def _message(turn: Turn) -> dict[str, Any]:
    said = turn.content
    parts: list[dict[str, Any]] = []
    if said.data is not None:
        kind = (said.data_type or (None,))[0] or "image/png"
        if not kind.startswith("image/"):
            raise ValueError(f"expected a picture, got {kind}")
        url = f"data:{kind};base64,{base64.b64encode(said.data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if said.text:
        parts.append({"type": "text", "text": said.text})
    return {"role": turn.role, "content": parts}


def main(address: str, picture: str, question: str) -> None:
    _config.load_base_config()
    generator = VQGuardServer(uri=address)
    kind = mimetypes.guess_type(picture)
    shown = Message(text=question, data_path=picture, data_type=kind)
    (answer,) = generator.generate(Conversation([Turn("user", shown)]))
    print(f"{answer.notes['finish_reason']}: {answer.text}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} ADDRESS PICTURE QUESTION")
    main(*sys.argv[1:])
