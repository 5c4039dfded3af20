"""LLaVA: a CLIP-style tower, a two-layer projector, codewords in place of `<image>` tokens.

Read from transformers' `models/llava/modeling_llava.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter, Site, VisualFeatures, stack_if_even, submodule
from vqguard.adapters.registry import register_adapter

_CLS_PARAMETERS = ("class_embedding", "cls_token")


@register_adapter("llava")
class LlavaAdapter(Adapter):
    """`LlavaForConditionalGeneration` with any tower that its config can name.

    Global token: row 0 of the selected hidden state, before the crop, through the same projector;
    with several `vision_feature_layer` the rows 0 are concatenated as the patches are. A tower
    without a CLS token (SigLIP, Pixtral) has the mean of the image's tokens instead.
    """

    sites = ("projected", "encoder")

    def width(self, model: nn.Module, site: Site) -> int:
        config = cast(Any, model).config
        if site == "projected":
            return super().width(model, site)
        self.require_site(site)
        layers = config.vision_feature_layer
        count = 1 if isinstance(layers, int) else len(layers)
        return int(config.vision_config.hidden_size) * count

    def encode(
        self, owner: nn.Module, arguments: Mapping[str, Any], site: Site
    ) -> tuple[VisualFeatures, Any]:
        if site == "projected":
            return super().encode(owner, arguments, site)
        # The selection of get_image_features, without its projector: that is what this site skips.
        passed = dict(arguments)
        pixels = passed.pop("pixel_values")
        sizes = passed.get("image_sizes")
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "return_dict"):
            passed.pop(name, None)
        tower = submodule(owner, self.vision_path, "vision encoder")
        output = tower(pixels, **{**passed, "output_hidden_states": True, "return_dict": True})
        selected = self._selected(owner, output, arguments)
        if self._strategy(owner, arguments) == "default":
            selected = selected[:, 1:]
        if sizes is None:
            tokens = list(selected)
        else:
            grid = torch.as_tensor(sizes) // cast(Any, tower).patch_size
            tokens = list(torch.split(selected.squeeze(0), grid.prod(dim=-1).tolist()))
        semantic = self.global_token(owner, output, tokens, arguments, site)
        return VisualFeatures(stack_if_even(tokens), semantic), output

    def global_token(
        self,
        owner: nn.Module,
        output: Any,
        tokens: list[Tensor],
        arguments: Mapping[str, Any],
        site: Site,
    ) -> Tensor:
        if not self.has_global_token(owner):
            return super().global_token(owner, output, tokens, arguments, site)
        row = self._selected(owner, output, arguments)[:, :1]
        if site == "encoder":
            return row
        return cast(Tensor, submodule(owner, self.projector_path, "projector")(row))

    def has_global_token(self, owner: nn.Module) -> bool:
        tower = submodule(owner, self.vision_path, "vision encoder")
        names = (name.rpartition(".")[2] for name, _ in tower.named_parameters())
        return any(name in _CLS_PARAMETERS for name in names)

    def _selected(self, owner: nn.Module, output: Any, arguments: Mapping[str, Any]) -> Tensor:
        """(B, rows, d_v): the hidden states that the config or the call selects, uncropped."""
        layers = arguments.get("vision_feature_layer")
        if layers is None:
            layers = cast(Any, owner).config.vision_feature_layer
        if isinstance(layers, int):
            return cast(Tensor, output.hidden_states[layers])
        return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)

    def _strategy(self, owner: nn.Module, arguments: Mapping[str, Any]) -> str:
        strategy = arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = cast(Any, owner).config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(
                f"expected vision_feature_select_strategy 'default' or 'full', got {strategy!r}"
            )
        return cast(str, strategy)
