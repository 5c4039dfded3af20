"""GLM: a video's frames stand at image placeholders, each behind its time."""

from __future__ import annotations

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel

_SAME = {"image": ("image_token_id",), "video": ("image_token_id",)}
_STAMPED = RandomModel(
    config={"text_config.rope_parameters.mrope_section": [2, 1, 1]}, stamped_frames=True
)

conventional(
    Family(
        "glm4v", checkpoints={"glm-4.1v": "zai-org/GLM-4.1V-9B-Thinking"}, random_model=_STAMPED
    ),
    Family("glm46v", random_model=_STAMPED),
    Family("glmga", proven_from="5.12", random_model=_STAMPED),
    Family(
        "glm4v_moe",
        random_model=RandomModel(
            config={"text_config.rope_parameters.mrope_section": [1, 1, 0]}, stamped_frames=True
        ),
    ),
    Family("glm_ocr", random_model=_STAMPED),
    Family(
        "glm5_next",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.num_key_value_heads": 4,
                "text_config.layer_types": ["linear_attention", "indexed_attention"],
                "text_config.indexer_types": ["full", "full"],
                "text_config.qk_rope_head_dim": 0,
                "text_config.index_head_dim": 8,
                "text_config.index_n_heads": 2,
                "text_config.linear_head_dim": 8,
                "text_config.linear_num_heads": 4,
                "text_config.head_dim": 0,
                "text_config.qk_head_dim": 8,
                "text_config.mlp_layer_types": ["dense", "sparse"],
                "text_config.index_kpool": 4,
            },
            stamped_frames=True,
        ),
    ),
    placeholders=_SAME,
)
