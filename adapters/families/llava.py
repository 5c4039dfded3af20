"""LLaVA: a CLIP-style tower, a two-layer projector, codewords in place of `<image>` tokens.

Read from transformers' `models/llava/modeling_llava.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Site
from vqguard.adapters.random_inputs.pixels import square
from vqguard.adapters.seams import Seam, parameter_names

_CLS_PARAMETERS = {"class_embedding", "cls_token"}


class ClsAdapter(Adapter):
    """Families whose tower has a CLS token at row 0, which the projector maps like any patch.

    Global token: row 0 of the selected hidden state, before the crop, through the same projector;
    with several `vision_feature_layer` the rows 0 are concatenated as the patches are. A tower
    without a CLS token (SigLIP, Pixtral) has the mean of the image's tokens instead.
    """

    sites: ClassVar[tuple[Site, ...]] = ("projected", "encoder")
    pointwise: ClassVar[tuple[str, ...]] = ("image", "video")
    row_by_row = True
    global_token_note = "CLS, else mean"

    def width(self, model: nn.Module, site: Site) -> int:
        if site == "projected":
            return super().width(model, site)
        self.require_site(site)
        config = cast(Any, model).config
        layers = getattr(config, "vision_feature_layer", -1)
        count = 1 if isinstance(layers, int) else len(layers)
        return int(config.vision_config.hidden_size) * count

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        if not self.has_global_token(shown.model):
            return super().global_token(shown)
        rows = self.selected(shown.model, shown.output, shown.arguments)[:, :1]
        if shown.site == "projected":
            rows = cast(Tensor, self.projector(shown.model)(rows))
        return self.by_unit(shown, rows)

    def by_unit(self, shown: Shown, rows: Tensor) -> Tensor | list[Tensor]:
        """(S_i, d) for each unit from the rows (tiles, 1, d) of all that the tower was shown."""
        return rows

    def has_global_token(self, model: nn.Module) -> bool:
        return bool(_CLS_PARAMETERS & parameter_names(self.tower(model)))

    def selected(self, model: nn.Module, output: Any, arguments: Mapping[str, Any]) -> Tensor:
        """(tiles, rows, d_v): the hidden states that the config or the call selects, uncropped."""
        layers = arguments.get("vision_feature_layer")
        if layers is None:
            layers = getattr(cast(Any, model).config, "vision_feature_layer", -1)
        if isinstance(layers, int):
            return cast(Tensor, output.hidden_states[layers])
        several = cast("list[int]", layers)
        return torch.cat([output.hidden_states[layer] for layer in several], dim=-1)


@register_adapter(
    Family(
        "llava",
        checkpoints={
            "llava-1.5": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
            "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
        },
        random_model=RandomModel(pixels={"image": square}),
    )
)
class LlavaAdapter(ClsAdapter):
    """`LlavaForConditionalGeneration` with any tower that its config can name."""

    tokenwise = True

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return list(features)
        grid = torch.as_tensor(sizes) // cast(Any, self.tower(model)).patch_size
        return list(torch.split(features.squeeze(0), grid.prod(dim=-1).tolist()))
