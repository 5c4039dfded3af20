"""Families that differ in names and sizes alone."""

from __future__ import annotations

from vqguard.adapters.families.default import conventional
from vqguard.adapters.families.family import Family, RandomModel

conventional(
    Family("internvl", checkpoints={"internvl3": "OpenGVLab/InternVL3-1B-hf"}),
    row_by_row=True,
)
conventional(
    Family(
        "aria", random_model=RandomModel(config={"projector_patch_to_query_dict": {16: 4, "16": 4}})
    ),
    Family("aya_vision", proven_from="5.20"),
    Family("cohere2_vision", proven_from="5.20"),
    "qianfan_ocr",
    "lighton_ocr",
    Family("exaone4_5", proven_from="5.12"),
    Family("hyperclovax_vision_v2", proven_from="5.20"),
    Family("minimax_m3_vl", proven_from="5.20"),
    Family(
        "mistral3",
        checkpoints={"mistral-small-3.1": "mistralai/Mistral-Small-3.1-24B-Instruct-2503"},
    ),
    Family(
        "mistral_large4",
        proven_from="5.22",
        random_model=RandomModel(
            config={
                "text_config.kv_source_layers": [0, 1],
                "text_config.no_rope_layers": [1, 1],
                "text_config.indexer_types": ["full", "full"],
                "text_config.qk_head_dim": 16,
                "text_config.index_head_dim": 16,
                "text_config.index_n_heads": 2,
                "text_config.num_key_value_heads": 4,
            }
        ),
    ),
    Family(
        "fast_vlm",
        random_model=RandomModel(
            config={
                "vision_config.hidden_size": 64,
                "vision_config.architecture": "fastvit_mci0",
                "vision_config.model_args": {
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [8, 8, 16, 16, 32],
                    "mlp_ratios": [2, 2, 2, 2, 2],
                    "se_downsamples": [False, False, False, False, False],
                    "downsamples": [False, True, True, True, True],
                    "pos_embs": [None, None, None, None, None],
                    "token_mixers": ["repmixer", "repmixer", "repmixer", "repmixer", "repmixer"],
                    "lkc_use_act": True,
                    "stem_use_scale_branch": False,
                },
            }
        ),
    ),
    Family(
        "ernie4_5_vl_moe",
        random_model=RandomModel(
            config={
                "text_config.moe_intermediate_size": [32, 16],
                "text_config.mlp_layer_types": ["dense", "sparse"],
                "text_config.moe_k": 2,
                "text_config.moe_num_experts": 8,
                "text_config.rope_parameters.mrope_section": [1, 1, 2],
            }
        ),
    ),
    Family(
        "dots3_note",
        proven_from="5.23",
        random_model=RandomModel(
            config={
                "text_config.per_layer_config": {},
                "vision_config.per_layer_config": {},
                "audio_config.per_layer_config": {},
                "vision_config.adapter_in_dim": 32,
                "vision_config.adapter_out_dim": 32,
                "audio_config.adapter_out_dim": 32,
                "audio_config.adapter_input_size": 32,
                "text_config.layer_types": ["indexed_attention", "sliding_attention"],
                "text_config.mlp_layer_types": ["dense", "sparse"],
                "text_config.num_key_value_heads": 4,
                "text_config.index_head_dim": 8,
                "text_config.index_n_heads": 2,
                "text_config.head_dim": 16,
                "text_config.shared_experts_intermediate_size": 32,
            }
        ),
    ),
)
conventional("ovis2", projector_paths=("visual_embeddings_table",))
conventional(
    Family(
        "hunyuan_vl",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "text_config.rope_parameters.mrope_section": [1, 1, 1, 1],
                "text_config.head_dim": 8,
                "vision_config.text_hidden_size": 32,
                "vision_config.max_image_size": 64,
            }
        ),
    ),
    Family(
        "hy_v4_vl",
        proven_from="5.24",
        random_model=RandomModel(
            config={
                "text_config.rope_parameters.mrope_section": [2, 1, 1],
                "text_config.indexer_types": ["full", "full"],
                "text_config.layer_types": ["indexed_attention", "indexed_attention"],
                "text_config.qk_head_dim": 16,
                "text_config.index_head_dim": 16,
                "text_config.index_n_heads": 2,
            }
        ),
    ),
    projector_paths=("vision_tower.patch_merger",),
)
_MUSE = {
    "out_hidden_size": 128,
    "projector_hidden_size": 64,
    "vision_config.layer_types": ["window_attention", "full_attention"],
    "vision_config.pos_emb_height": 8,
    "vision_config.pos_emb_width": 8,
    "text_config.layer_rope_theta": [10000.0, 10000.0],
}

conventional(
    Family(
        "muse_glimmer",
        proven_from="5.20",
        random_model=RandomModel(config=_MUSE),
    ),
    Family(
        "muse_spark",
        proven_from="5.20",
        random_model=RandomModel(config={**_MUSE, "audio_config.num_hidden_layers": 4}),
    ),
    projector_paths=("vision_adapter", "vision_projection"),
)
