"""Perception LM: tiles of 28 x 28."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.random_inputs.pixels import Pixels, noise


def two_tiles(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 2, 3, 28, 28)."""
    return {"pixel_values": noise(generator, images, 2, 3, 28, 28)}


def short_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 2, 3, 28, 28): frames smaller than pictures."""
    return {"pixel_values_videos": noise(generator, videos, 2, 3, 28, 28)}


conventional(
    Family(
        "perception_lm",
        random_model=RandomModel(
            config={
                "vision_config.architecture": "vit_pe_core_large_patch14_336",
                "vision_config.model_args": {
                    "embed_dim": 32,
                    "img_size": [28, 28],
                    "depth": 2,
                    "num_heads": 2,
                    "global_pool": "",
                    "use_post_transformer_norm": False,
                    "init_values": 0.1,
                    "ref_feat_shape": [2, 2],
                },
                "vision_use_cls_token": True,
                "projector_pooling_ratio": 1,
            },
            pixels={"image": two_tiles, "video": short_frames},
        ),
    ),
    refused_note="videos in `generate`",
)
