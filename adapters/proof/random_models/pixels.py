"""Pixels in the form that each family's processor gives them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.seams import Seam, submodule

Pixels = dict[str, Any]
Maker = Callable[[Any, int, torch.Generator], Pixels]
"""(model, images, generator) -> the encoder's arguments."""


def maker(model: Any, seam: Seam) -> Maker:
    """How a family's pixels look; found by the encoder's arguments where nothing is declared."""
    declared = PIXELS.get((model.config.model_type, seam.modality))
    if declared is not None:
        return declared
    names = inspect.signature(getattr(submodule(model, seam.path, "seam"), seam.method)).parameters
    if "image_grid_thw" in names:
        return packed_patches
    if "video_grid_thw" in names:
        return packed_videos
    if seam.modality == "video":
        return frames
    return sized if "image_sizes" in names else square


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Noise whose strength grows along the first dimension, so that no two pictures look alike."""
    pixels = torch.randn(*shape, generator=generator)
    return pixels * torch.linspace(0.3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))


def square(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 3, 32, 32)."""
    return {"pixel_values": noise(generator, images, 3, 32, 32)}


def packed_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """Patches of all pictures in one row, of mixed sizes, with their grids."""
    vision = model.config.vision_config
    patch = getattr(vision, "patch_size", 8)
    time = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1) or 1
    grids = [(1, 4, 4) if index % 2 == 0 else (1, 4, 8) for index in range(images)]
    rows = [
        noise(generator, h * w, 3 * time * patch * patch) * (0.3 + index)
        for index, (_, h, w) in enumerate(grids)
    ]
    return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids)}


def packed_videos(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """The same with two frames each."""
    pixels = packed_patches(model, videos, generator)
    grid = pixels["image_grid_thw"].clone()
    grid[:, 0] = 2
    patches = noise(generator, int(grid.prod(-1).sum()), pixels["pixel_values"].shape[1])
    return {"pixel_values_videos": patches, "video_grid_thw": grid}


def sized(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 3, 32, 32) with image_sizes."""
    return {**square(model, images, generator), "image_sizes": torch.tensor([[32, 32]] * images)}


def frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 2, 3, 32, 32): two frames a video."""
    return {"pixel_values_videos": noise(generator, videos, 2, 3, 32, 32)}


def tiles(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 5, 3, 32, 32): pictures of mixed sizes, cut into at most four tiles beside the whole."""
    sizes = [(64, 64) if index % 2 == 0 else (30, 60) for index in range(images)]
    return {
        "pixel_values": noise(generator, images, 5, 3, 32, 32),
        "image_sizes": torch.tensor(sizes),
    }


def by_sample(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """(B, most images, 3, 32, 32): pictures by row of the batch, with empty ones in between."""
    pixels = noise(generator, sum(images), 3, 32, 32)
    filled = torch.zeros(len(images), max(images), 3, 32, 32)
    for row, part in enumerate(torch.split(pixels, list(images))):
        filled[row, : len(part)] = part
    return {"pixel_values": filled}


def listed_tiles(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """The same with a mask of the real pictures."""
    pixels = by_sample(model, images, generator)["pixel_values"]
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).flatten(2).any(-1)}


def with_high_resolution(model: Any, images: int, generator: torch.Generator) -> Pixels:
    return {
        **square(model, images, generator),
        "high_res_pixel_values": noise(generator, images, 3, 128, 128),
    }


def large(side: int) -> Maker:
    """(n, 3, side, side)."""

    def make(model: Any, images: int, generator: torch.Generator) -> Pixels:
        return {"pixel_values": noise(generator, images, 3, side, side)}

    return make


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


def conv_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """Packed patches that are still pictures: (patches, 3, 8, 8)."""
    packed = packed_patches(model, images, generator)
    packed["pixel_values"] = packed["pixel_values"].reshape(-1, 3, 8, 8)
    return packed


def conv_videos(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    packed = packed_videos(model, videos, generator)
    packed["pixel_values_videos"] = packed["pixel_values_videos"].reshape(-1, 3, 8, 8)
    return packed


def merged_by_two(model: Any, images: int, generator: torch.Generator) -> Pixels:
    packed = packed_patches(model, images, generator)
    return {**packed, "image_merge_sizes": torch.tensor([2] * images)}


def videos_merged_by_two(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    packed = packed_videos(model, videos, generator)
    return {**packed, "video_merge_sizes": torch.tensor([2] * videos)}


def spatial_shapes(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 192) patches with the shape of each picture in patches."""
    return {
        "pixel_values": noise(generator, images, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4]] * images),
        "pixel_attention_mask": torch.ones(images, 16, dtype=torch.long),
    }


def strip(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(1, 3, 8, 8 * patches): all pictures in one strip, with their sizes in patches."""
    return {
        "pixel_values": noise(generator, 3, 8, 8 * 16 * images)[None],
        "target_sizes": torch.tensor([[4, 4]] * images),
    }


def video_strip(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    found = strip(model, videos, generator)
    return {
        "pixel_values_videos": found["pixel_values"],
        "target_sizes_videos": found["target_sizes"],
    }


def pooled_crops(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 192) crops with the patches that each token pools: a grid of 2 x 2 a picture."""
    index = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    return {
        "pixel_values": noise(generator, images, 16, 192),
        "image_token_pooling": torch.cat([index + 16 * one for one in range(images)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * images),
    }


def pooled_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    index = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
    return {
        "pixel_values_videos": noise(generator, 2 * videos, 16, 192),
        "video_token_pooling": torch.cat([index + 16 * one for one in range(2 * videos)]),
        "video_grids": torch.tensor([[2, 2, 2]] * videos),
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


def merged_squares(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(tokens, 16, 16, 3): the squares that two by two patches make."""
    return {
        "pixel_values": noise(generator, 4 * images, 16, 16, 3),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
    }


def with_question(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """One picture a row, with the text that the Q-Former reads."""
    ids = torch.arange(3, 9).repeat(images, 1)
    return {**square(model, images, generator), "qformer_input_ids": ids}


def four_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 4, 3, 32, 32) with the text that the Q-Former reads."""
    ids = torch.arange(3, 9).repeat(videos, 1)
    return {
        "pixel_values": noise(generator, videos, 4, 3, 32, 32),
        "qformer_input_ids": ids,
    }


def flattened(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 2 + 192): row and column of each patch in front of it."""
    grid = torch.meshgrid(torch.arange(1, 5), torch.arange(1, 5), indexing="ij")
    places = torch.stack(grid, -1).reshape(1, 16, 2).repeat(images, 1, 1).float()
    patch = getattr(model.config.vision_config, "patch_size", 8)
    patches = noise(generator, images, 16, 3 * patch * patch)
    return {"flattened_patches": torch.cat([places, patches], -1)}


def tiled_by_sample(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """(B, most images, 2, 3, 32, 32) with aspect ratios; 0 marks a picture that is not there."""
    flat = noise(generator, sum(images), 2, 3, 32, 32)
    most = max(images)
    pixels = torch.zeros(len(images), most, 2, 3, 32, 32)
    ids = torch.zeros(len(images), most, dtype=torch.long)
    mask = torch.zeros(len(images), most, 2, dtype=torch.long)
    mask[..., 0] = 1
    for row, part in enumerate(torch.split(flat, list(images))):
        pixels[row, : len(part)] = part
        ids[row, : len(part)] = 2
        mask[row, : len(part)] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def frames_of_patches(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """Two frames a video, each as patches with positions."""
    found = patches_with_positions(model, 2 * videos, generator)
    positions = patches_with_positions(model, 1, generator)["image_position_ids"]
    return {
        "pixel_values_videos": found["pixel_values"],
        "video_position_ids": positions.repeat(2 * videos, 1, 1),
        "num_frames_per_video": torch.tensor([2] * videos),
    }


def one_tile(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 1, 3, 28, 28)."""
    return {"pixel_values": noise(generator, images, 1, 3, 28, 28)}


def short_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    return {"pixel_values_videos": noise(generator, videos, 2, 3, 28, 28)}


def raw_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 8, 192) patches without an encoder."""
    return {"pixel_values": noise(generator, images, 8, 192)}


BY_SAMPLE: dict[str, Any] = {
    "idefics2": by_sample,
    "idefics3": by_sample,
    "smolvlm": by_sample,
    "granite_docling": listed_tiles,
    "idefics": by_sample,
    "mllama": tiled_by_sample,
}
"""Families whose pixels are laid out by row of the batch."""

PIXELS: dict[tuple[str, str], Maker] = {
    ("deepseek_ocr2", "image"): large(128),
    ("deepseek_vl_hybrid", "image"): with_high_resolution,
    ("diffusion_gemma", "image"): patches_with_positions,
    ("gemma4", "image"): patches_with_positions,
    ("gemma4_unified", "image"): patches_with_positions,
    ("fuyu", "image"): raw_patches,
    ("gemma3n", "image"): large(64),
    ("gemma4", "video"): frames_of_patches,
    ("gemma4_unified", "video"): frames_of_patches,
    ("granite4_vision", "image"): tiles,
    ("instructblip", "image"): with_question,
    ("instructblipvideo", "video"): four_frames,
    ("kosmos-2.5", "image"): flattened,
    ("perception_lm", "image"): one_tile,
    ("perception_lm", "video"): short_frames,
    ("pix2struct", "image"): flattened,
    ("pp_formulanet", "image"): large(64),
    ("inkling2", "image"): merged_squares,
    ("inkling2_loop", "image"): merged_squares,
    ("kimi_k25", "image"): conv_patches,
    ("kimi_k25", "video"): conv_videos,
    ("lfm2_vl", "image"): spatial_shapes,
    ("llava", "image"): square,
    ("llava_next", "image"): tiles,
    ("llava_next_video", "image"): tiles,
    ("llava_onevision", "image"): tiles,
    ("minicpm_ocr", "image"): strip,
    ("minicpm_ocr", "video"): video_strip,
    ("minicpmv4_6", "image"): strip,
    ("minicpmv4_6", "video"): video_strip,
    ("minicpmv4_7", "image"): strip,
    ("minicpmv4_7", "video"): video_strip,
    ("molmo2", "image"): pooled_crops,
    ("molmo2", "video"): pooled_frames,
    ("nemotron_h_omni", "image"): grid_hw,
    ("nemotron_h_omni", "video"): tubelets,
    ("paddleocr_vl", "image"): conv_patches,
    ("unlimited_ocr", "image"): large(128),
    ("video_llama_3", "image"): merged_by_two,
    ("video_llama_3", "video"): videos_merged_by_two,
}
