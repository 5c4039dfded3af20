"""Gemma and PaliGemma."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import leave_unguarded
from vqguard.adapters.random_inputs.pixels import Pixels, large, noise


def patches_with_positions(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 64, 48) patches of 4 x 4 pixels, the last ones padding where a picture is smaller."""
    vision = model.config.vision_config
    side = 4 * (getattr(vision, "model_patch_size", None) or vision.patch_size)
    width = 3 * (side // 4) ** 2
    rows = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1)
    positions = rows.reshape(1, 64, 2).repeat(images, 1, 1)
    positions[1::2, 32:] = -1
    pixels = noise(generator, images, 64, width).abs() * (positions[..., :1] >= 0)
    return {"pixel_values": pixels, "image_position_ids": positions}


def frames_of_patches(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """Two frames a video, each as patches with positions."""
    frames = patches_with_positions(model, 2 * videos, generator)
    positions = patches_with_positions(model, 1, generator)["image_position_ids"]
    return {
        "pixel_values_videos": frames["pixel_values"],
        "video_position_ids": positions.repeat(2 * videos, 1, 1),
        "num_frames_per_video": torch.tensor([2] * videos),
    }


conventional(
    Family(
        "gemma3",
        checkpoints={"gemma-3": "google/gemma-3-4b-it"},
        random_model=RandomModel(config={"mm_tokens_per_image": 4}),
    ),
    Family("shieldgemma2", random_model=RandomModel(config={"mm_tokens_per_image": 4})),
    "paligemma",
    row_by_row=True,
)
conventional(
    Family(
        "gemma3n",
        random_model=RandomModel(
            config={
                "text_config.intermediate_size": 64,
                "text_config.activation_sparsity_pattern": [0.0, 0.0],
                "text_config.num_kv_shared_layers": 0,
                "text_config.layer_types": ["sliding_attention", "full_attention"],
                "text_config.laurel_rank": 8,
                "vision_config.architecture": "test_efficientnet",
                "vision_config.hidden_size": 256,
                "vision_config.vocab_size": 8,
                "vision_config.vocab_offset": 112,
                "vision_soft_tokens_per_image": 4,
                "audio_config.vocab_size": 8,
                "audio_config.vocab_offset": 120,
                "audio_config.conf_num_hidden_layers": 1,
                "audio_config.conf_num_attention_heads": 4,
            },
            pixels={"image": large(64)},
        ),
    ),
    Family(
        "gemma4",
        checkpoints={"gemma-4": "google/gemma-4-E2B-it"},
        proven_from="5.23",
        random_model=RandomModel(
            config={
                "vision_config": {
                    "model_type": "gemma4_vision",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "head_dim": 8,
                    "patch_size": 4,
                    "pooling_kernel_size": 2,
                    "position_embedding_size": 64,
                },
                "text_config.per_layer_config": {},
                "text_config.layer_types": ["sliding_attention", "full_attention"],
                "text_config.num_experts": None,
            },
            pixels={"image": patches_with_positions, "video": frames_of_patches},
        ),
    ),
)
conventional(
    Family(
        "gemma4_unified",
        proven_from="5.23",
        random_model=RandomModel(
            config={
                "vision_config": {"hidden_size": 32, "patch_size": 4, "num_hidden_layers": 2},
                "text_config.per_layer_config": {},
                "text_config.layer_types": ["sliding_attention", "full_attention"],
            },
            pixels={"image": patches_with_positions, "video": frames_of_patches},
        ),
    ),
    vision_path="embed_vision",
    projector_paths=("embed_vision",),
)
leave_unguarded(
    Family(
        "diffusion_gemma",
        refused="its generate writes blocks of tokens at once, where a refusal cannot be carried "
        "out row by row",
        random_model=RandomModel(
            config={
                "text_config.per_layer_config": {},
                "text_config.layer_types": ["sliding_attention", "full_attention"],
                "text_config.num_experts": 4,
                "text_config.top_k_experts": 2,
                "text_config.moe_intermediate_size": 32,
                "vision_config.patch_size": 4,
                "vision_config.pooling_kernel_size": 2,
                "vision_config.position_embedding_size": 64,
                "canvas_length": 4,
            },
            pixels={"image": patches_with_positions},
        ),
    )
)
