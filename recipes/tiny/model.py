"""llava-tiny's parts: tokenizer, processor and the untrained model, from the real classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vqguard.config import StrictConfig
from vqguard.recipes.tiny.language import vocabulary
from vqguard.recipes.tiny.scenes import IMAGE_SIZE

IMAGE_TOKEN = "<image>"
PIXEL_MEAN = 0.5
PIXEL_STD = 0.25

# LLaVA-1.5's turn format. Spaces keep the words apart for the word-level tokenizer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


@dataclass(frozen=True)
class TinySizes(StrictConfig):
    """Sizes of the miniature. Widths in numbers a token; the image is 96 x 96 pixels."""

    patch_size: int = 16
    vision_width: int = 192
    vision_layers: int = 6
    vision_heads: int = 3
    vision_mlp: int = 576
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 4
    text_mlp: int = 512

    @property
    def patches(self) -> int:
        """Visual tokens an image."""
        return (IMAGE_SIZE // self.patch_size) ** 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the world's vocabulary; upper and lower case are the same."""
    special = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN, "USER:", "ASSISTANT:"]
    ids = {word: i for i, word in enumerate([*special, *vocabulary()])}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": IMAGE_TOKEN,
            "user_token": "USER:",
            "assistant_token": "ASSISTANT:",
        },
        padding_side="left",
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(sizes: TinySizes, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: pads to a square, scales to 96 pixels, normalises, expands `<image>`."""
    images = LlavaImageProcessor(
        do_pad=True,
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        do_center_crop=True,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        do_normalize=True,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def build_model(
    sizes: TinySizes, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The untrained model. Seed torch before calling.

    The vision layer is the tower's last, not LLaVA-1.5's last but one: the tower is trained for
    this layer, so one more would be dead weight.
    """
    token = {name: _token_id(tokenizer, name) for name in ("<pad>", "<s>", "</s>", IMAGE_TOKEN)}
    common: dict[str, Any] = {
        "pad_token_id": token["<pad>"],
        "bos_token_id": token["<s>"],
        "eos_token_id": token["</s>"],
        "tie_word_embeddings": True,
    }
    # As loading sets it: a run that resumes from a saved model writes the same config.
    dtype: dict[str, Any] = {"dtype": "float32"}
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_mlp,
        image_size=IMAGE_SIZE,
        patch_size=sizes.patch_size,
        **dtype,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_heads,
        intermediate_size=sizes.text_mlp,
        max_position_embeddings=512,
        **common,
        **dtype,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token[IMAGE_TOKEN],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.patches,
        **common,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = token["<pad>"]
    model.generation_config.eos_token_id = token["</s>"]
    model.generation_config.bos_token_id = token["<s>"]
    return model


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int):
        raise TypeError(f"expected one id for {token!r}, got {token_id!r}")
    return token_id


def normalise(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 pictures (B, 96, 96, 3) to the model's pixel values, float32 (B, 3, 96, 96).

    The same numbers as the processor gives for pictures that already have the model's size.
    """
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32)
    return (pixels / 255.0 - PIXEL_MEAN) / PIXEL_STD
