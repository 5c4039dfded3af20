"""Kosmos-2 and 2.5: features at the positions of a mask.

Read from transformers' `models/kosmos2` and `kosmos2_5`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.encoder_decoder import flattened, with_places
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Site
from vqguard.adapters.random_inputs.prompts import BOS, Layout, pad_rows
from vqguard.adapters.seams import Seam


def masked(layout: Layout) -> dict[str, Any]:
    """Places for the picture at the front, told by a mask."""
    number = layout.counts[0] if layout.counts else 0
    numbers = range(len(layout.images))
    rows = [[BOS, *[3] * number, 4, *range(5, 9 + row)] for row in numbers]
    places = [[0, *[1] * number, 0, *[0] * (4 + row)] for row in numbers]
    ids, mask = pad_rows(rows, layout.right)
    marked, _ = pad_rows(places, layout.right, fill=0)
    return {"input_ids": ids, "attention_mask": mask, "image_embeds_position_mask": marked}


_SIZES = {
    "latent_query_num": 4,
    "text_config.ffn_dim": 64,
    "text_config.layers": 2,
    "text_config.attention_heads": 4,
    "text_config.embed_dim": 32,
}


@register_adapter(
    Family(
        "kosmos-2",
        checkpoints={"kosmos-2": "microsoft/kosmos-2-patch14-224"},
        proven_from="5.24",
        random_model=RandomModel(
            config=_SIZES,
            prompt=masked,
            one_a_row=True,
        ),
    ),
    Family(
        "kosmos-2.5",
        proven_from="5.24",
        random_model=RandomModel(
            config={
                **_SIZES,
                "vision_config.patch_embed_hidden_size": 192,
                "vision_config.max_num_patches": 16,
            },
            pixels={"image": flattened},
            prompt=masked,
            one_a_row=True,
        ),
    ),
)
class KosmosAdapter(DefaultAdapter):
    """Features at the positions of a mask; `generate` is the text model's."""

    vision_path = "vision_model"
    projector_paths = ("image_to_text_projection",)
    language_path = "text_model"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        usual = super().seams(model)[0]
        return (Seam("", pixels=usual.pixels, joins="prepend"),)

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.text_config.embed_dim)

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        drawn = super().redraw(name, pixels, generator)
        return with_places(pixels, drawn) if name == "flattened_patches" else drawn

    def generation_config(self, model: nn.Module) -> Any:
        return cast(Any, self.language_model(model)).generation_config

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = cast(Any, language).model(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)
