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
from vqguard.adapters.features import Shown
from vqguard.adapters.random_inputs.pixels import Pixels, noise
from vqguard.adapters.seams import Seam
from vqguard.errors import SeamError


def _pooled_patches() -> Tensor:
    """(4, 4): for each of 2 x 2 cells the patches of a 4 x 4 grid that lie in it."""
    return rearrange(torch.arange(16), "(i h j w) -> (i j) (h w)", i=2, h=2, j=2)


def pooled_crops(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(3 n, 16, 192) crops with the patches that each token pools.

    A picture is the whole, a grid of 2 x 2, and two crops side by side, together one of 2 x 4.
    """
    index = _pooled_patches()
    beside = rearrange(torch.cat([index, index + 16]), "(c h w) k -> (h c w) k", c=2, h=2)
    return {
        "pixel_values": noise(generator, 3 * images, 16, 192),
        "image_token_pooling": torch.cat(
            [torch.cat([index, beside + 16]) + 48 * image for image in range(images)]
        ),
        "image_grids": torch.tensor([[2, 2, 2, 4]] * images),
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
    """Features are added to the embeddings of their placeholders, which differ by position.

    The mean of the tokens that read each crop is judged: crops overlap, and lie side by side in
    the tokens' order.
    """

    additive = True
    global_token_note = "mean of the whole picture and of each crop, of each frame"

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        if shown.seam.modality == "video":
            return super().global_token(shown)
        pixels = shown.arguments["pixel_values"]
        if pixels.dim() != 3:
            raise SeamError(
                f"expected pixel_values (crops, patches, values), got {tuple(pixels.shape)}: crops "
                "cannot be judged one by one"
            )
        pooled = shown.arguments["image_token_pooling"]
        crops = torch.where(pooled < 0, -1, pooled // pixels.shape[1])
        judged = []
        for unit, read in zip(
            shown.units, torch.split(crops, [len(unit) for unit in shown.units]), strict=True
        ):
            own = [crop for crop in read.unique().tolist() if crop >= 0]
            parts = [unit[(read == crop).any(-1).to(unit.device)] for crop in own]
            # Tokens that read no patch at all are judged too.
            blind = unit[(read < 0).all(-1).to(unit.device)]
            parts += [blind] if len(blind) else []
            judged.append(torch.stack([part.mean(0) for part in parts]))
        return judged

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, joins="add") for seam in super().seams(model))
