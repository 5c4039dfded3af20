"""A config made small: known size fields are cut wherever they stand, the rest is the family's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqguard.adapters.random_inputs.prompts import BOS, EOS, PAD

IMAGE, VIDEO, AUDIO = 100, 101, 102
VOCABULARY = 128
SIDE = 32

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "image_size": SIDE,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "ffn_dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_embd": 32,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "projection_dim": 32,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "vision_start_token_id": 103,
    "vision_end_token_id": 104,
    "image_start_token_id": 105,
    "image_end_token_id": 106,
    "video_start_token_id": 107,
    "video_end_token_id": 108,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "num_query_tokens": 4,
    "image_seq_length": 16,
    "sliding_window": 16,
    "vision_hidden_size": 32,
    "n_codebooks": 1,
    "num_image_tokens": 4,
    "mlp_ratio": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with the fields of `SIZES` cut, in its sub-configs as well."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("transformers_version", "architectures"):
            continue
        if name == "initializer_range" and isinstance(value, float) and value < 1e-3:
            small[name] = 0.02  # weights of nothing would show nothing
        elif isinstance(value, dict) and name.endswith(("config", "_cfg", "encoder", "decoder")):
            small[name] = shrink(value)
        elif name in SIZES and value is not None and not isinstance(value, (list, tuple, dict)):
            size = SIZES[name]
            small[name] = type(value)(size) if type(value) in (int, float) else size
        else:
            small[name] = value
    if isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = _small_rope(small["rope_parameters"])
    layers = small.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types"):
        kinds = small.get(name)
        if isinstance(kinds, list) and layers:
            # The first kinds and the last one: hybrids keep both.
            small[name] = kinds[: layers - 1] + kinds[-1:] if len(kinds) >= layers else None
    return small


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of multimodal positions cut to heads of width 8, half of it where half is turned."""
    if "mrope_section" not in rope:
        return rope
    half = (rope.get("partial_rotary_factor") or 1.0) < 1
    return {**rope, "mrope_section": [1, 1, 0] if half else [2, 1, 1]}


def override(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with values at dotted paths set."""
    for path, value in changes.items():
        *heads, last = path.split(".")
        place = config
        for head in heads:
            if place.get(head) is None:
                place[head] = {}
            place = place[head]
        place[last] = value
    return config
