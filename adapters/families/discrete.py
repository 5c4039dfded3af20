"""Families that turn pictures into tokens of their own vocabulary.

Their features are embeddings already, and are quantised again with the guard's codebook. What is
special is that a user can type the same tokens: those are refused.

Read from transformers' `models/chameleon`, `emu3` and `apertus1p5`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.registration import register_adapter


class DiscreteAdapter(DefaultAdapter):
    """The picture's tokenizer stays as it is: stage 1 trains the codebooks alone."""

    vision_path = "vqmodel"
    projector_paths = ("vqmodel",)
    trains_projector = False
    refused_note = "image tokens in the prompt"

    def stage1_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return self._parameters_of(model, [self._guard(model)])

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        mapping = cast(Any, self.owner(model)).vocabulary_mapping
        return torch.tensor(sorted(mapping.bpe2img))


@register_adapter("emu3")
class Emu3Adapter(DiscreteAdapter):
    """`text_model` reads, `vqmodel` sees."""


@register_adapter("chameleon")
class ChameleonAdapter(DiscreteAdapter):
    """The owner is the language model itself."""

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        return [cast(Any, self.owner(model)).layers[0]]

    def language_model(self, model: nn.Module) -> nn.Module:
        return self.owner(model)

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        owner = cast(Any, self.owner(model))
        return [owner.embed_tokens, owner.layers, owner.norm, cast(Any, model).lm_head]


@register_adapter("apertus1p5")
class ApertusAdapter(DiscreteAdapter):
    """Image tokens are a range of the vocabulary."""

    vision_path = "vision_tokenizer"
    projector_paths = ("vision_tokenizer",)

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        config = cast(Any, model).config
        start = int(config.image_token_offset)
        return torch.arange(start, start + int(config.vision_config.codebook_size))
