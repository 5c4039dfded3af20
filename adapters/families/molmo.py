"""Molmo 2: features are added to placeholders, crops and frames are pooled by index.

Read from transformers' `models/molmo2`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.random_inputs.pixels import Pixels, noise
from vqguard.adapters.seams import Seam


def _pooled_patches() -> Tensor:
    """(4, 4): for each of 2 x 2 cells the patches of a 4 x 4 grid that lie in it."""
    return rearrange(torch.arange(16), "(i h j w) -> (i j) (h w)", i=2, h=2, j=2)


def pooled_crops(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 192) crops with the patches that each token pools: a grid of 2 x 2 a picture."""
    index = _pooled_patches()
    return {
        "pixel_values": noise(generator, images, 16, 192),
        "image_token_pooling": torch.cat([index + 16 * crop for crop in range(images)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * images),
    }


def pooled_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(2 n, 16, 192) frames, two a video, with the patches that each token pools."""
    index = _pooled_patches()
    return {
        "pixel_values_videos": noise(generator, 2 * videos, 16, 192),
        "video_token_pooling": torch.cat([index + 16 * crop for crop in range(2 * videos)]),
        "video_grids": torch.tensor([[2, 2, 2]] * videos),
    }


@register_adapter(
    Family(
        "molmo2",
        checkpoints={"molmo2": "allenai/Molmo2-8B"},
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "image_patch_id": 100,
                "text_config.additional_vocab_size": 0,
                "adapter_config.vision_feature_layer": [-1, -2],
                "vision_config.num_position_embeddings": 16,
                "vision_config.image_size": [32, 32],
                "adapter_config.text_hidden_size": 32,
                "text_config.rope_scaling_layers": None,
            },
            pixels={"image": pooled_crops, "video": pooled_frames},
        ),
    )
)
class MolmoAdapter(DefaultAdapter):
    """Features are added to the embeddings of their placeholders, which differ by position."""

    additive = True

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, joins="add") for seam in super().seams(model))
