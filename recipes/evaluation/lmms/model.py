"""A run's guarded model under lmms-eval's tasks, as it answers anybody: refusals are answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image

from vqguard.errors import ConfigError, InputError
from vqguard.images import check_plain
from vqguard.recipes.data.chat import ChatTemplate
from vqguard.recipes.run import open_run

log = logging.getLogger(__name__)
NEW_TOKENS = 1024
"""Longest answer where a task names none."""
_CHOOSING = ("temperature", "top_p", "num_beams")


class GuardedModel(lmms):  # type: ignore[misc]
    """A guarded model that lmms-eval measures; rows are answered one by one.

    Args:
        pretrained: a run's directory, or a guarded model's folder.
        base: for a guard without its base, where that is.
        batch_size: 1.
        device: where the model must be; None: where it is put, a GPU if there is one.
        unknown: whatever else is given in `--model_args` is refused.

    Raises:
        ConfigError: another batch size or device, or an argument that is not known.
        ArtefactError: there is no guarded model.
        InputError: a judge without a language model.
    """

    is_simple = False  # it takes messages

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"expected pretrained= and base=, got {', '.join(unknown)}")
        if int(batch_size) != 1:
            raise ConfigError(f"expected batch size 1 (rows are answered alone), got {batch_size}")
        self.run = open_run(Path(pretrained), base=base)
        self.run.require_language_model()
        there = self.run.model.device.type
        if device is not None and torch.device(device).type != there:
            raise ConfigError(f"the model is on {there}, not on {device}: leave --device out")
        self.template = ChatTemplate(self.run.processor)
        self.batch_size = 1
        self.device = self.run.model.device
        self.refused = 0
        """Requests with a flagged picture."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request.

        Raises:
            InputError: a request with a video or a sound.
        """
        answers = []
        for request in requests:
            _, messages_of, choosing, number, task, split = request.args
            messages = messages_of(self.task_dict[task][split][number])
            answers.append(self._answer(ChatMessages(messages=messages), choosing))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        log.info("%d of %d requests were refused", self.refused, len(requests))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a guarded model gives answers, and no likelihoods of others'")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not run")

    @torch.no_grad()
    def _answer(self, asked: ChatMessages, choosing: Mapping[str, Any]) -> str:
        images, videos, sounds = asked.extract_media()
        if videos or sounds:
            raise InputError("expected tasks of pictures and texts, got a video or a sound")
        pictures = [_plain(image) for image in images]
        text = self.template.asked([_message(message) for message in asked.messages])
        shown = {"images": pictures} if pictures else {}
        inputs = self.run.processor(text=[text], return_tensors="pt", **shown).to(self.device)
        output = self.run.model.generate(
            **inputs, **_arguments(choosing), return_dict_in_generate=True
        )
        self.refused += any(verdict.flagged for verdict in output.verdicts)
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        said: str = self.run.processor.tokenizer.decode(new, skip_special_tokens=True)
        until = choosing.get("until") or ()
        for end in [until] if isinstance(until, str) else until:
            said = said.partition(end)[0] if end else said
        return said.strip()


def _plain(image: Any) -> Image.Image:
    """A picture of a data set; tasks give what `datasets` opened."""
    if not isinstance(image, Image.Image):
        raise InputError(f"expected a picture, got {type(image).__name__}")
    picture = image if image.mode == "RGB" else image.convert("RGB")
    check_plain(picture)
    return picture


def _message(message: Any) -> dict[str, Any]:
    parts = [
        {"type": "image"} if part.type == "image" else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": parts}


def _arguments(choosing: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is given for a task's settings."""
    sampled = float(choosing.get("temperature") or 0) > 0
    names = _CHOOSING if sampled else ("num_beams",)
    given = {name: choosing[name] for name in names if choosing.get(name) is not None}
    longest = choosing.get("max_new_tokens", NEW_TOKENS)
    return {"max_new_tokens": longest, "do_sample": sampled, **given}
