"""Families that are given a picture as a whole and, in an argument of their own, tiles of it.

Read from transformers' `models/deepseek_ocr2`, `unlimited_ocr` and `step3p7`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown
from vqguard.adapters.random_inputs.pixels import Maker, Pixels, noise
from vqguard.adapters.seams import equal_parts
from vqguard.errors import SeamError


def views(side: int, *, grids: bool = False) -> Maker:
    """(n, 3, side, side), every second picture with two tiles of that size beside it."""

    def make(model: Any, images: int, generator: torch.Generator) -> Pixels:
        counts = [2 * (index % 2) for index in range(images)]
        pixels: Pixels = {"pixel_values": noise(generator, images, 3, side, side)}
        if not any(counts):
            return pixels
        pixels["pixel_values_local"] = noise(generator, sum(counts), 3, side, side)
        pixels["num_local_patches"] = counts
        if grids:
            pixels["patches_grid"] = [[count, min(count, 1)] for count in counts]
        return pixels

    return make


class LocalViewsAdapter(DefaultAdapter):
    """A unit is a picture: its tiles' tokens, then those of the whole. Each is judged by its mean.

    No argument says how many tokens a tile has: they go by area, as the towers' own sizes do
    (144 of 768 x 768 and 256 of 1024 x 1024 pixels, 81 of 504 x 504 and 169 of 728 x 728).
    """

    global_token_note = "mean of the whole picture and of each tile"

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        counts = self.counts(shown.arguments)
        if counts is None:
            return super().global_token(shown)
        judged = []
        for picture, (unit, count) in enumerate(zip(shown.units, counts, strict=True)):
            each = self.tokens_of_a_tile(unit, count, shown.arguments)
            whole, tiles = unit[each * count :], unit[: each * count]
            parts = self.tiles(tiles, count, picture, shown.arguments) if count else ()
            judged.append(torch.stack([part.mean(0) for part in (whole, *parts)]))
        return judged

    def counts(self, arguments: Mapping[str, Any]) -> list[int] | None:
        """Tiles of each picture; None where there are none."""
        counts = arguments.get("num_local_patches")
        if arguments.get("pixel_values_local") is None or counts is None:
            return None
        return [int(count) for count in counts]

    def tokens_of_a_tile(self, unit: Tensor, count: int, arguments: Mapping[str, Any]) -> int:
        """How many of a picture's tokens each of its tiles has.

        Raises:
            SeamError: when they do not go by area.
        """
        tile, whole = (
            pixels.shape[-2] * pixels.shape[-1]
            for pixels in (arguments["pixel_values_local"], arguments["pixel_values"])
        )
        each, rest = divmod(len(unit) * int(tile), int(whole) + count * int(tile))
        if rest:
            raise SeamError(
                f"expected {len(unit)} visual tokens to be shared out by area among a picture of "
                f"{whole} pixels and {count} tiles of {tile}: its tiles cannot be judged one by one"
            )
        return each

    def tiles(
        self, tokens: Tensor, count: int, picture: int, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """The tokens of each tile, from those of all tiles of a picture."""
        return equal_parts(tokens, count)


_SAM_ENCODER = {
    "vision_config.sam_config.global_attn_indexes": [1],
    "vision_config.sam_config.output_channels": 16,
    "vision_config.sam_config.mlp_dim": 64,
    "vision_config.sam_config.image_size": 128,
    "vision_config.sam_config.downsample_channels": [24, 32],
}


@register_adapter(
    Family(
        "deepseek_ocr2",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                **_SAM_ENCODER,
                "vision_config.encoder_config.layer_types": ["full_attention", "full_attention"],
                "text_config.num_experts_per_tok": 2,
                "text_config.n_group": 1,
                "text_config.topk_group": 1,
                "text_config.mlp_layer_types": ["dense", "sparse"],
            },
            pixels={"image": views(128)},
        ),
    )
)
class DeepseekOcrAdapter(LocalViewsAdapter):
    """A separator follows the whole picture."""

    static_parameters = ("view_separator",)


@register_adapter(
    Family(
        "unlimited_ocr",
        proven_from="5.20",
        random_model=RandomModel(
            config={**_SAM_ENCODER, "vision_config.sam_config.patch_size": 8},
            pixels={"image": views(128, grids=True)},
        ),
    )
)
class UnlimitedOcrAdapter(LocalViewsAdapter):
    """Tokens of the tiles stand row by row of the whole picture, a newline token behind each."""

    static_parameters = ("image_newline", "view_separator")

    def tiles(
        self, tokens: Tensor, count: int, picture: int, arguments: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        columns, rows = (int(number) for number in arguments["patches_grid"][picture])
        side = round((len(tokens) / count) ** 0.5)
        if columns * rows != count or count * side * side != len(tokens):
            raise SeamError(
                f"expected the {len(tokens)} visual tokens of {count} tiles as squares on a grid, "
                f"got a grid of {columns} x {rows}: its tiles cannot be judged one by one"
            )
        squares = rearrange(tokens, "(r q c p) d -> (r c) (q p) d", r=rows, q=side, c=columns)
        return tuple(squares)


@register_adapter(
    Family(
        "step3p7",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.sliding_window": 16,
                "text_config.num_sliding_attention_heads": 4,
                "text_config.share_expert_dim": 32,
            },
            pixels={"image": views(32)},
        ),
    )
)
class StepAdapter(LocalViewsAdapter):
    """Nothing stands between the tiles and the whole."""
