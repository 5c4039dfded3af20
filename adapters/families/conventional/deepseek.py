"""DeepSeek's vision-language models, Janus, and readers of documents with SAM's tower."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.random_inputs.pixels import Pixels, noise, square


def with_high_resolution(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 3, 32, 32) pictures, and the same number again at 128 x 128."""
    return {
        **square(model, images, generator),
        "high_res_pixel_values": noise(generator, images, 3, 128, 128),
    }


conventional(
    "deepseek_vl",
    Family(
        "janus",
        random_model=RandomModel(
            config={
                "vision_config.num_image_tokens": 16,
                "vision_config.projection_dim": 32,
                "vq_config.base_channels": 32,
                "vq_config.channel_multiplier": [1, 1],
                "vq_config.num_res_blocks": 1,
                "vq_config.num_embeddings": 16,
                "vq_config.latent_channels": 8,
                "vq_config.image_token_embed_dim": 32,
                "vq_config.num_patches": 4,
            }
        ),
    ),
)
conventional(
    Family(
        "deepseek_vl_hybrid",
        random_model=RandomModel(
            config={
                "high_res_vision_config.image_size": 128,
                "high_res_vision_config.output_channels": 16,
                "high_res_vision_config.mlp_dim": 64,
                "high_res_vision_config.global_attn_indexes": [1],
            },
            pixels={"image": with_high_resolution},
        ),
    ),
    projector_paths=("aligner", "high_res_vision_proj"),
)
_SAM = RandomModel(
    config={
        "vision_config.output_channels": 16,
        "vision_config.mlp_dim": 64,
        "vision_config.global_attn_indexes": [1],
        "vision_config.window_size": 2,
    }
)

conventional(Family("got_ocr2", random_model=_SAM), Family("pp_chart2table", random_model=_SAM))
