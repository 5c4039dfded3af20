"""Samples to tensors: chat template, image tokens, labels masked to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from vqguard.adapters.seams import stack_if_even
from vqguard.errors import DataError, InputError
from vqguard.recipes.samples import Sample

if TYPE_CHECKING:
    from vqguard.recipes.feature_cache import FeatureCache

IGNORED = -100
ENCODER_TOKENS, ENCODER_SEMANTIC = "encoder_tokens", "encoder_semantic"
Example = dict[str, Any]


class EncodedSamples(Dataset[Example]):
    """Samples as a torch dataset, encoded when they are asked for.

    An item holds ``input_ids``, ``labels`` (``IGNORED`` outside the answers), ``caption_ids``
    (int64 lists) and, with a picture, whatever the image processor gives (``pixel_values`` …), or
    with a cache the vision encoder's outputs (``encoder_tokens``, ``encoder_semantic``).

    Args:
        samples: what to encode.
        processor: a transformers processor with a chat template and a fast tokenizer.
        max_length: longest sequence in tokens. The end of a longer one is cut.
        cache: the vision encoder's outputs of these samples' pictures.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Any,
        max_length: int,
        cache: FeatureCache | None = None,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise InputError(
                f"{type(processor).__name__} has no chat template, so the turns cannot be written "
                "down as this model expects them. Set processor.chat_template."
            )
        self.samples = samples
        self.processor = processor
        self.max_length = max_length
        self.cache = cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        sample = self.samples[index]
        text, answers = conversation_text(self.processor, sample)
        tokenizer = self.processor.tokenizer
        flat = tokenizer(text, return_offsets_mapping=True)
        labels = [
            token if any(a <= start and end <= b and end > start for a, b in answers) else IGNORED
            for token, (start, end) in zip(flat["input_ids"], flat["offset_mapping"], strict=True)
        ]
        example: Example = {}
        ids = list(flat["input_ids"])
        if sample.image is not None and self.cache is not None:
            kept = self.cache[sample.id]
            ids, labels = self._repeat(ids, labels, kept.placeholders)
            example[ENCODER_TOKENS] = kept.tokens
            example[ENCODER_SEMANTIC] = kept.semantic
        elif sample.image is not None:
            full = self.processor(images=[sample.image()], text=[text], return_tensors="pt")
            ids, labels = self._expand(ids, labels, full.pop("input_ids")[0].tolist(), sample.id)
            full.pop("attention_mask", None)
            example.update(full)
        caption = tokenizer(sample.caption)["input_ids"]
        example["input_ids"] = ids[: self.max_length]
        example["labels"] = labels[: self.max_length]
        example["caption_ids"] = caption[: self.max_length]
        if all(label == IGNORED for label in example["labels"]):
            raise DataError(
                f"sample {sample.id}: no answer token is left within {self.max_length} tokens. "
                "Raise max_length or shorten the sample."
            )
        return example

    def _repeat(
        self, ids: list[int], labels: list[int], placeholders: int
    ) -> tuple[list[int], list[int]]:
        """Write the picture's placeholder as often as the processor does."""
        place = ids.index(self.processor.image_token_id)
        filled = [self.processor.image_token_id] * placeholders
        return (
            [*ids[:place], *filled, *ids[place + 1 :]],
            [*labels[:place], *[IGNORED] * placeholders, *labels[place + 1 :]],
        )

    def _expand(
        self, ids: list[int], labels: list[int], full: list[int], name: str
    ) -> tuple[list[int], list[int]]:
        """Give every token of the processor's output its label; image tokens get none."""
        image = self.processor.image_token_id
        spread: list[int] = []
        place = 0
        for token, label in zip(ids, labels, strict=True):
            if token == image:
                while place < len(full) and full[place] == image:
                    spread.append(IGNORED)
                    place += 1
                continue
            if place >= len(full) or full[place] != token:
                break
            spread.append(label)
            place += 1
        if len(spread) != len(full):
            raise DataError(
                f"sample {name}: the processor's tokens are not the tokenizer's with image tokens "
                f"expanded (they part at token {place}), so the answers cannot be located."
            )
        return full, spread


def conversation_text(processor: Any, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """The sample under the chat template, and the character span of each answer in it.

    Raises:
        DataError: the template does not write a conversation as the continuation of its beginning.
    """
    messages: list[dict[str, Any]] = []
    spans = []
    whole = ""
    for number, (question, answer) in enumerate(sample.turns):
        content: Any = [{"type": "text", "text": question}]
        if sample.image is not None and number == 0:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        asked = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        told = processor.apply_chat_template(messages, tokenize=False)
        if not asked.startswith(whole) or not told.startswith(asked):
            raise DataError(
                f"sample {sample.id}: the chat template rewrites earlier turns, so the answers "
                "cannot be located. Use single-turn conversations with this model."
            )
        spans.append((len(asked), len(told)))
        whole = told
    return whole, spans


def prompt_text(processor: Any, question: str, *, picture: bool) -> str:
    """A single question under the chat template, ready to be answered."""
    content: list[dict[str, str]] = [{"type": "text", "text": question}]
    if picture:
        content.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": content}]
    text: str = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


@dataclass(frozen=True)
class Collator:
    """Pads a list of items on the right. ``pixel_values`` and the like are concatenated."""

    pad_token_id: int

    def __call__(self, items: Sequence[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "input_ids": self._pad([i["input_ids"] for i in items], self.pad_token_id),
            "labels": self._pad([i["labels"] for i in items], IGNORED),
            "attention_mask": self._pad([[1] * len(i["input_ids"]) for i in items], 0),
            "caption_ids": self._pad([i["caption_ids"] for i in items], self.pad_token_id),
            "caption_mask": self._pad([[1] * len(i["caption_ids"]) for i in items], 0),
        }
        listed = ("input_ids", "labels", "caption_ids")
        tokens = [item[ENCODER_TOKENS] for item in items if ENCODER_TOKENS in item]
        if tokens:
            batch[ENCODER_TOKENS] = stack_if_even(tokens)
            kept = [item[ENCODER_SEMANTIC] for item in items if ENCODER_SEMANTIC in item]
            batch[ENCODER_SEMANTIC] = torch.stack(kept)
        taken = {*listed, ENCODER_TOKENS, ENCODER_SEMANTIC}
        for key in sorted({key for item in items for key in item} - taken):
            batch[key] = torch.cat([item[key] for item in items if key in item])
        return batch

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        length = max(len(row) for row in rows)
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])
