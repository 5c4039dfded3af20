"""Qwen-VL and its relatives: patches of all images in one row, a merger inside the tower.

Read from transformers' `models/qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` and `qwen3_5`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.features import Site, Tap
from vqguard.adapters.registration import register_adapter
from vqguard.adapters.seams import Seam


@register_adapter("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen2_5_omni_thinker")
class QwenAdapter(DefaultAdapter):
    """Site "encoder": the patches that the merger is given, before it joins them four by four.

    A temporal patch of a video (two frames, as the processor cuts it) is judged by itself: the
    tower's attention does not leave it, and time is the first axis of the tokens at both sites.
    """

    global_token_note = "mean, of each temporal patch"

    sites = ("projected", "encoder")
    projector_paths: ClassVar[tuple[str, ...]] = ("visual.merger",)

    def width(self, model: nn.Module, site: Site) -> int:
        if site == "projected":
            return super().width(model, site)
        self.require_site(site)
        vision = cast(Any, model).config.vision_config
        # Qwen2-VL calls the language model's width hidden_size and its own embed_dim
        return int(getattr(vision, "embed_dim", None) or vision.hidden_size)

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        return list(torch.split(features, self.grid(seam, arguments).prod(-1).tolist()))

    def grid(self, seam: Seam, arguments: Mapping[str, Any]) -> Tensor:
        """(units, 3): temporal patches, rows and columns."""
        return cast(Tensor, arguments[f"{seam.modality}_grid_thw"])


@register_adapter("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cohere_compass")
class DeepStackAdapter(QwenAdapter):
    """Features of early layers of the tower, added to early layers of the language model."""

    deep_list = "visual.deepstack_merger_list"
    projector_paths = ("visual.merger", "visual.deepstack_merger_list")

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, deep="deepstack_features") for seam in super().seams(model))

    def deep_levels(self, model: nn.Module) -> int:
        return len(cast(Any, model).config.vision_config.deepstack_visual_indexes)

    def taps(self, model: nn.Module) -> tuple[Tap, ...]:
        path = self.owner_path(model)
        deep = [
            Tap(f"{path}.{self.deep_list}.{level}", level=level)
            for level in range(self.deep_levels(model))
        ]
        return (*super().taps(model), *deep)


@register_adapter("qwen3_omni_moe_thinker")
class QwenOmniAdapter(DeepStackAdapter):
    """The same with another name for the list."""

    deep_list = "visual.merger_list"
    projector_paths = ("visual.merger", "visual.merger_list")
