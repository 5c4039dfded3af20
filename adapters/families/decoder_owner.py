"""Families whose owner is the text decoder itself, with the picture's encoder inside it."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from vqguard.adapters.base import Adapter


class DecoderOwnerAdapter(Adapter):
    """The language model is the owner; what it trains are its parts that read no picture."""

    def language_model(self, model: nn.Module) -> nn.Module:
        return self.owner(model)

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        owner = cast(Any, self.owner(model))
        return [owner.embed_tokens, owner.layers, owner.norm, cast(Any, model).lm_head]
