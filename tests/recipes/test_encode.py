"""Samples to tensors: image tokens expanded, labels on the answers and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.encoding import IGNORED, Collator, EncodedSamples
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.tiny.world import TinyWorld


def picture() -> Image.Image:
    return Image.new("RGB", (96, 96), "blue")


TWO_TURNS = Sample(
    "s", (picture,), (("<image>\nwhat is this ?", "dog ."), ("is there a cat ?", "no ."))
)


def test_labels_are_the_answers_with_their_ends(small_model: Any) -> None:
    _, processor = small_model()
    item = EncodedSamples([TWO_TURNS], processor, 128)[0]
    tokenizer = processor.tokenizer
    scored = [i for i, label in enumerate(item["labels"]) if label != IGNORED]
    assert [item["labels"][i] for i in scored] == [item["input_ids"][i] for i in scored]
    assert tokenizer.decode([item["labels"][i] for i in scored]) == "dog . </s> no . </s>"
    assert item["input_ids"].count(processor.image_token_id) == 9
    assert tokenizer.decode(item["caption_ids"][0], skip_special_tokens=True) == "dog ."


def test_every_sample_of_the_world_encodes_like_the_processor(small_model: Any) -> None:
    _, processor = small_model()
    samples = TinyWorld(0).instructions(24)
    encoded = EncodedSamples(samples, processor, 512)
    for index, sample in enumerate(samples):
        item = encoded[index]
        answers = " ".join(answer for _, answer in sample.turns).split()
        said = [t for t in item["labels"] if t != IGNORED]
        words = processor.tokenizer.convert_ids_to_tokens(said)
        assert [w for w in words if w != "</s>"] == answers
        assert ("pixel_values" in item) == (sample.image is not None)


def test_padding_is_masked_and_never_scored(small_model: Any) -> None:
    _, processor = small_model()
    text_only = Sample("t", (), (("hello", "no ."),))
    data = EncodedSamples([TWO_TURNS, text_only], processor, 128)
    batch = Collator(processor.tokenizer.pad_token_id)([data[0], data[1]])
    assert batch["pixel_values"].shape == (1, 3, 96, 96)
    padded = batch["attention_mask"] == 0
    assert padded[1].any()
    assert (batch["labels"][padded] == IGNORED).all()
    assert torch.equal(batch["caption_mask"].sum(1), torch.tensor([3]))


def test_a_sample_without_room_for_its_answer_is_refused(small_model: Any) -> None:
    _, processor = small_model()
    with pytest.raises(DataError, match="max_length"):
        EncodedSamples([TWO_TURNS], processor, 10)[0]


def test_a_processor_without_a_chat_template_is_refused(small_model: Any) -> None:
    _, processor = small_model()
    processor.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        EncodedSamples([TWO_TURNS], processor, 10)
