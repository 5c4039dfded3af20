"""Families that take packed patches, each in a form of its own."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.random_inputs.pixels import Pixels, noise, packed_patches, packed_videos


def conv_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """Packed patches that are still pictures: (patches, 3, 8, 8)."""
    packed = packed_patches(model, images, generator)
    packed["pixel_values"] = packed["pixel_values"].reshape(-1, 3, 8, 8)
    return packed


def conv_videos(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """Packed patches of videos that are still pictures: (patches, 3, 8, 8)."""
    packed = packed_videos(model, videos, generator)
    packed["pixel_values_videos"] = packed["pixel_values_videos"].reshape(-1, 3, 8, 8)
    return packed


def merged_by_two(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """Packed patches, and by how many of them a side each picture is merged."""
    packed = packed_patches(model, images, generator)
    return {**packed, "image_merge_sizes": torch.tensor([2] * images)}


def videos_merged_by_two(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """The same for videos."""
    packed = packed_videos(model, videos, generator)
    return {**packed, "video_merge_sizes": torch.tensor([2] * videos)}


def merged_squares(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(tokens, 16, 16, 3): the squares that two by two patches make."""
    return {
        "pixel_values": noise(generator, 4 * images, 16, 16, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
    }


def spatial_shapes(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 192) patches with the shape of each picture in patches."""
    return {
        "pixel_values": noise(generator, images, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]] * images),
        "pixel_attention_mask": torch.ones(images, 16, dtype=torch.long),
    }


def grid_hw(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(patches, 192) with the grid (height, width) of each picture."""
    return {
        "pixel_values": noise(generator, 16 * images, 192),
        "image_grid_hw": torch.tensor([[4, 4]] * images),
    }


def tubelets(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 2, 6, 32, 32): tubelets of two frames."""
    return {"pixel_values_videos": noise(generator, videos, 2, 6, 32, 32)}


conventional(
    Family(
        "kimi_k25",
        proven_from="5.24",
        random_model=RandomModel(
            config={
                "text_config.num_key_value_heads": 4,
                "vision_config.projection_hidden_size": 32,
                "projection_hidden_size": 32,
            },
            pixels={"image": conv_patches, "video": conv_videos},
        ),
    ),
    pools_time=True,
)
conventional(
    Family(
        "paddleocr_vl",
        proven_from="5.20",
        random_model=RandomModel(
            config={"text_config.rope_parameters.mrope_section": [2, 1, 1]},
            pixels={"image": conv_patches},
        ),
    ),
    Family(
        "video_llama_3",
        random_model=RandomModel(pixels={"image": merged_by_two, "video": videos_merged_by_two}),
    ),
    Family("lfm2_vl", random_model=RandomModel(pixels={"image": spatial_shapes})),
    Family(
        "lfm3_vl",
        proven_from="5.23",
        random_model=RandomModel(config={"text_config.layer_types": ["conv", "full_attention"]}),
    ),
)

_INKLING = RandomModel(
    config={
        "vision_config.text_hidden_size": 32,
        "vision_config.projection_hidden_dim": 64,
        "vision_config.posemb_grid_size": 4,
        "text_config.unpadded_vocab_size": 128,
    },
    pixels={"image": merged_squares},
)

conventional(
    Family("inkling2", proven_from="5.23", random_model=_INKLING),
    Family("inkling2_loop", proven_from="5.24", random_model=_INKLING),
    projector_paths=("vision_tower",),
)
conventional(
    Family(
        "nemotron_h_omni",
        proven_from="5.24",
        random_model=RandomModel(
            config={
                "image_token_id": 100,
                "video_token_id": 101,
                "vision_config.patch_dim": 192,
                "vision_config.video_patch_dim": 384,
                "vision_config.max_img_size": 64,
                "projector_hidden_size": 32,
                "text_config.mamba_num_heads": 4,
                "text_config.mamba_head_dim": 8,
                "text_config.ssm_state_size": 8,
                "text_config.n_groups": 2,
                "text_config.layers_block_type": ["linear_attention", "full_attention"],
                "text_config.moe_shared_expert_intermediate_size": 32,
            },
            pixels={"image": grid_hw, "video": tubelets},
        ),
    ),
    placeholders={"image": ("image_token_id",), "video": ("image_token_id",)},
)
