"""Qwen-VL and its relatives: patches of all images in one row, a merger inside the tower.

Read from transformers' `models/qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` and `qwen3_5`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqguard.adapters.families.default import DefaultAdapter, conventional
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Site, Tap
from vqguard.adapters.seams import Seam, submodule
from vqguard.regional.layout import Layout, holds

_OMNI = {
    "text_config.rope_parameters.mrope_section": [2, 1, 1],
    "vision_start_token_id": 103,
    "vision_end_token_id": 104,
}


@register_adapter(
    Family(
        "qwen2_vl",
        checkpoints={"qwen2-vl": "Qwen/Qwen2-VL-7B-Instruct"},
        random_model=RandomModel(config={"text_config.rope_parameters.mrope_section": [2, 1, 1]}),
    ),
    Family(
        "qwen2_5_vl",
        checkpoints={"qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct"},
        # Below, its beam search fails, guarded or not.
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.rope_parameters.mrope_section": [2, 1, 1],
                "vision_config.window_size": 32,
                "vision_config.fullatt_block_indexes": [1],
            }
        ),
    ),
    Family(
        "qwen3_5",
        checkpoints={"qwen3.5": "Qwen/Qwen3.5-27B"},
        random_model=RandomModel(stamped_frames=True),
    ),
    Family("qwen3_5_moe", random_model=RandomModel(stamped_frames=True)),
    Family(
        "qwen2_5_omni_thinker",
        proven_from="5.22",
        random_model=RandomModel(
            config={
                **_OMNI,
                "vision_config.fullatt_block_indexes": [1],
            }
        ),
    ),
)
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

    def layouts(self, shown: Shown) -> Sequence[Layout | None]:
        if shown.site == "encoder":  # there the tokens that are merged stand together
            return [None] * len(shown.units)
        side = int(cast(Any, shown.model).config.vision_config.spatial_merge_size)
        found: list[Layout | None] = []
        grids = self.grid(shown.seam, shown.arguments).tolist()
        for unit, (times, rows, columns) in zip(shown.units, grids, strict=True):
            layout = ((rows // side, columns // side),) * times
            found.append(layout if holds(layout, len(unit)) else None)
        return found

    def unseen(self, model: nn.Module, states: Any) -> Any:
        """The mergers lie inside the tower: they are run on codewords, here in its place."""
        output = BaseModelOutputWithPooling(last_hidden_state=states)
        levels = {
            tap.level: submodule(model, tap.path, "merger")(states) for tap in self.taps(model)
        }
        output.pooler_output = levels.pop(None)
        cast(Any, output).deepstack_features = list(levels.values())
        return output

    def grid(self, seam: Seam, arguments: Mapping[str, Any]) -> Tensor:
        """(units, 3): temporal patches, rows and columns."""
        return cast(Tensor, arguments[f"{seam.modality}_grid_thw"])


_DEEP_STACK = RandomModel(
    config={
        "vision_config.deepstack_visual_indexes": [0, 1],
        "vision_config.num_position_embeddings": 64,
    },
    stamped_frames=True,
)


@register_adapter(
    Family(
        "qwen3_vl",
        checkpoints={"qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct"},
        proven_from="5.20",
        random_model=_DEEP_STACK,
    ),
    Family(
        "qwen3_vl_moe",
        checkpoints={"qwen3-vl-moe": "Qwen/Qwen3-VL-30B-A3B-Instruct"},
        proven_from="5.20",
        random_model=_DEEP_STACK,
    ),
    Family(
        "cosmos3_omni",
        proven_from="5.20",
        random_model=_DEEP_STACK,
    ),
    Family(
        "cohere_compass",
        proven_from="5.22",
        random_model=RandomModel(
            config={
                "text_config.rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
                "vision_config.deepstack_visual_indexes": [0],
                "vision_config.num_position_embeddings": 64,
            },
            stamped_frames=True,
        ),
    ),
)
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


@register_adapter(
    Family(
        "qwen3_omni_moe_thinker",
        proven_from="5.22",
        random_model=RandomModel(
            config={
                **_OMNI,
                "vision_config.deepstack_visual_indexes": [0, 1],
                "audio_config.num_hidden_layers": 1,
                "vision_config.num_position_embeddings": 64,
            }
        ),
    )
)
class QwenOmniAdapter(DeepStackAdapter):
    """The same with another name for the list."""

    deep_list = "visual.merger_list"
    projector_paths = ("visual.merger", "visual.merger_list")


conventional(
    Family(
        "qwen4_exp",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.indexer_n_heads": 2,
                "text_config.indexer_kv_heads": 1,
                "text_config.indexer_head_dim": 8,
                "text_config.indexer_budget": 16,
                "text_config.indexer_compress_ratio": 2,
                "text_config.hc_lowrank": 8,
                "text_config.linear_key_head_dim": 8,
                "text_config.linear_value_head_dim": 8,
                "text_config.linear_num_key_heads": 2,
                "text_config.linear_num_value_heads": 4,
                "text_config.ngram_vocab_size_base": 64,
                "text_config.split_ngram_parts": 1,
                "text_config.rope_parameters.mrope_section": [2, 1, 1],
            },
            stamped_frames=True,
        ),
    ),
    Family(
        "cosmos3_edge",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.rope_parameters.mrope_section": [2, 1, 1],
                "projector_hidden_size": 64,
                "vision_config.num_patches": 16,
            },
            stamped_frames=True,
        ),
    ),
)
