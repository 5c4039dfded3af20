"""A conversation as the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from PIL import Image

from vqguard.errors import InputError
from vqguard.images import check_plain
from vqguard.recipes.data.chat import ChatTemplate
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.wire.refusals import bad_request, too_large
from vqguard.recipes.serving.wire.schema import ChatRequest, ImagePart, Message, Part

_CHARACTERS = 32
"""Characters of a text for each token that it may have; a longer one is not tokenized at all."""
_TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class EncodedPrompt:
    """One request's inputs on the CPU."""

    input_ids: list[int]
    inputs: dict[str, torch.Tensor]
    """What the processor gives beside the text, as for a batch of one."""
    pictures: int

    @property
    def kind(self) -> tuple[str, ...]:
        """Prompts of one kind can be answered together."""
        return tuple(sorted(self.inputs))

    def example(self) -> dict[str, Any]:
        """The inputs as items of a batch are given."""
        return {"input_ids": self.input_ids, **self.inputs}


class PromptEncoder:
    """Conversations under a model's chat template. Safe to use from several threads."""

    def __init__(self, model: Any, processor: Any, limits: Limits) -> None:
        self.processor = processor
        self.template = ChatTemplate(processor)
        text = model.config.get_text_config()
        own = getattr(text, "max_position_embeddings", None)
        self.context = (
            min(limits.prompt_tokens, own) if isinstance(own, int) else limits.prompt_tokens
        )
        self.most_total = own if isinstance(own, int) else None
        self.lock = Lock()
        """Held while the processor is used."""

    def encode(self, request: ChatRequest, pictures: Sequence[Image.Image]) -> EncodedPrompt:
        """The prompt of a request; `pictures` are those of its messages, in order.

        Raises:
            RequestError: 400 or 413, saying why.
        """
        messages = [chat_message(message) for message in request.messages]
        characters = sum(
            len(part.get("text", "")) for message in messages for part in message["content"]
        )
        if characters > _CHARACTERS * self.context:
            raise too_large(
                "characters of the conversation", _CHARACTERS * self.context, "messages"
            )
        for picture in pictures:
            check_plain(picture)
        try:
            with self.lock:
                text = self.template.asked(messages)
                shown = {"images": list(pictures)} if pictures else {}
                encoded = dict(self.processor(text=[text], return_tensors="pt", **shown))
        except (InputError, ValueError) as error:
            raise bad_request(str(error), param="messages") from error
        ids = encoded["input_ids"][0].tolist()
        if len(ids) > self.context:
            raise bad_request(
                f"the prompt has {len(ids):,} tokens, pictures included; at most {self.context:,} "
                "are accepted: shorten the conversation",
                "context_length_exceeded",
                "messages",
            )
        inputs = {name: value for name, value in encoded.items() if name not in _TEXT}
        return EncodedPrompt(ids, inputs, len(pictures))

    def room(self, prompt: EncodedPrompt, asked: int | None, limits: Limits) -> int:
        """How many tokens the answer may have.

        Raises:
            RequestError: 400 where the request asks for more than there may be.
        """
        most = limits.new_tokens
        if self.most_total is not None:
            most = min(most, self.most_total - len(prompt.input_ids))
        if most < 1 or (asked is not None and asked > limits.new_tokens):
            raise bad_request(
                f"asked for {asked or 1:,} tokens, at most {max(most, 0):,} can be answered here",
                "context_length_exceeded" if most < 1 else "invalid_value",
                "max_tokens",
            )
        return most if asked is None else min(asked, most)


def chat_message(message: Message) -> dict[str, Any]:
    """A message in the form that chat templates take.

    Raises:
        RequestError: 400 for one that is empty.
    """
    content: str | Sequence[Part] = message.content
    parts: list[dict[str, str]] = []
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    else:
        for part in content:
            if isinstance(part, ImagePart):
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part.text})
    parts = [part for part in parts if part["type"] == "image" or part["text"].strip()]
    if not parts:
        raise bad_request(f"a message of the {message.role} is empty", param="messages")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": parts}


def picture_urls(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Where each picture of a request stands, and its address, in the order of the messages."""
    return [
        (f"messages.{number}.content.{place}", part.image_url.url)
        for number, message in enumerate(messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
