"""Granite's vision models: deep-stack features.

Read from transformers' `models/granite_docling` and `granite4_vision`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.by_row import ByRowAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.llava_next import PINPOINTS, TiledAdapter
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown
from vqguard.adapters.random_inputs.pixels import Pixels, by_sample, tiles
from vqguard.adapters.seams import Seam


def listed_tiles(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """The same with a mask of the real pictures."""
    pixels = by_sample(model, images, generator)["pixel_values"]
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).flatten(2).any(-1)}


@register_adapter(
    Family(
        "granite_docling",
        proven_from="5.23",
        random_model=RandomModel(
            config={"vision_config.deepstack_visual_indexes": [0, 1]}, pixels_by_row=listed_tiles
        ),
    )
)
class GraniteDoclingAdapter(ByRowAdapter):
    """Deep-stack features of a connector, added inside the text model."""

    def shown(self, arguments: Mapping[str, Any]) -> list[int] | None:
        mask = arguments.get("pixel_attention_mask")
        return None if mask is None else [int(count) for count in mask.bool().sum(-1)]

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, deep="deepstack_features") for seam in super().seams(model))

    def deep_levels(self, model: nn.Module) -> int:
        return len(cast(Any, model).config.vision_config.deepstack_visual_indexes)


@register_adapter(
    Family(
        "granite4_vision",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "vision_config.hidden_size": 64,
                "vision_config.image_size": 32,
                "deepstack_layer_map": [[-1, 0], [-2, 1]],
                "downsample_rate": "1/2",
                "spatial_target_layers": [0, 1],
                "image_grid_pinpoints": PINPOINTS,
                "qformer_config": {
                    "model_type": "blip_2_qformer",
                    "hidden_size": 64,
                    "encoder_hidden_size": 64,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 1,
                    "intermediate_size": 64,
                    "vocab_size": 128,
                    "cross_attention_frequency": 1,
                    "use_qformer_text_input": False,
                },
                "projector_dropout": 0.0,
            },
            pixels={"image": tiles},
        ),
    )
)
class GraniteVisionAdapter(TiledAdapter):
    """All features are deep-stack: one list of images for each layer of the text that they join.

    One codebook serves all layers; a unit is an image with the features of every layer in a row.
    """

    sites = ("projected",)
    global_token_note = "mean of the whole picture and of each tile"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return (replace(super().seams(model)[0], field="deepstack_features"),)

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        owner = cast(Any, self.owner(model))
        names = ("layerwise_projectors", "spatial_projectors")
        return [getattr(owner, name) for name in names if getattr(owner, name, None) is not None]

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(images for _, images in features), strict=True)]

    def join(self, seam: Seam, like: Any, units: list[Tensor]) -> Any:
        parts = [torch.chunk(unit, len(like)) for unit in units]
        return [(layer, [stack[i] for stack in parts]) for i, (layer, _) in enumerate(like)]

    def has_global_token(self, model: nn.Module) -> bool:
        return False

    def projected_tiles(self, shown: Shown) -> Tensor:
        """(tiles, layers x N, d): what all projectors make of each tile."""
        owner, states = cast(Any, self.owner(shown.model)), shown.output.hidden_states
        config = owner.config
        pairs = [
            *zip(
                owner.layerwise_projectors, (n for n, _ in config.deepstack_layer_map), strict=True
            ),
            *(
                (projector, config.spatial_vision_layer)
                for projector in getattr(owner, "spatial_projectors", None) or ()
            ),
        ]
        tiles = [projector(self.cropped(shown, states[layer])) for projector, layer in pairs]
        return torch.cat(tiles, dim=1)

    def positions(self, model: nn.Module, counts: list[int]) -> list[int]:
        config = cast(Any, model).config
        layers = len(config.deepstack_layer_map) + len(config.spatial_target_layers)
        return [count // layers for count in counts]
