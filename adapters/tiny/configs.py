"""What each family's config needs beyond smaller sizes."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_PAIR = ["sliding_attention", "full_attention"]

LEFT_OUT = {
    "evolla": "it reads proteins, no pixels",
    "mistral4": "it reads text only",
}
"""Types of the mapping that see no pixels, with the reason."""

SCALES: dict[str, float] = {}
"""Factor on the random weights, where 2 is not right."""

CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass": {
        "text_config.rope_parameters": _BOTH,
        "vision_config.deepstack_visual_indexes": [0],
        "vision_config.num_position_embeddings": 64,
    },
    "cosmos3_edge": {
        "text_config.rope_parameters.mrope_section": [2, 1, 1],
        "projector_hidden_size": 64,
        "vision_config.num_patches": 16,
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 100, **{f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(8)}},
        "image_token_id": 100,
        "vq_config.num_embeddings": 8,
        "vq_config.embed_dim": 8,
        "vq_config.latent_channels": 8,
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 2],
        "vq_config.num_res_blocks": 1,
        "vq_config.resolution": 32,
    },
    "gemma4": {
        "text_config.per_layer_config": ...,
        "text_config.layer_types": _PAIR,
        "text_config.num_experts": None,
    },
    "gemma4_unified": {"text_config.per_layer_config": ..., "text_config.layer_types": _PAIR},
    "glm5_next": {
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
    "hunyuan_vl": {"text_config.head_dim": 8, "vision_config.text_hidden_size": 32},
    "hy_v4_vl": {
        "text_config.rope_parameters.mrope_section": [2, 1, 1],
        "text_config.indexer_types": ["full", "full"],
        "text_config.layer_types": ["indexed_attention"] * 2,
        "text_config.qk_head_dim": 16,
        "text_config.index_head_dim": 16,
        "text_config.index_n_heads": 2,
    },
    "mistral_large4": {
        "text_config.kv_source_layers": [0, 1],
        "text_config.no_rope_layers": [1, 1],
        "text_config.indexer_types": ["full", "full"],
        "text_config.qk_head_dim": 16,
        "text_config.index_head_dim": 16,
        "text_config.index_n_heads": 2,
    },
    "molmo2": {
        "adapter_config.vision_feature_layer": [-1, -2],
        "vision_config.num_position_embeddings": 16,
        "vision_config.image_size": [32, 32],
        "adapter_config.text_hidden_size": 32,
        "text_config.rope_scaling_layers": None,
    },
}
