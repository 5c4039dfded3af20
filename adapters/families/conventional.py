"""Families that fit the default adapter, one line each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.registration import register_adapter
from vqguard.adapters.seams import Seam


def family(*types: str, **declared: Any) -> type[Adapter]:
    """Register a default adapter for these types, with what differs from the usual names."""
    name = "".join(part.capitalize() for part in types[0].replace("-", "_").split("_")) + "Adapter"
    body = {"__doc__": f"The default adapter for {', '.join(types)}.", "__module__": __name__}
    adapter = type(name, (DefaultAdapter,), {**body, **declared})
    globals()[name] = adapter  # pickle, which copies a model to another process, finds it by name
    return register_adapter(*types)(adapter)


family("aria", "aya_vision", "cohere2_vision", "gemma3", "shieldgemma2", "paligemma", "internvl")
family("qianfan_ocr", "mistral3", "mistral_large4", "minimax_m3_vl", "fast_vlm")
family("perception_lm", refused_note="videos in `generate`")
family("got_ocr2", "pp_chart2table", "deepseek_vl", "janus", "lfm2_vl", "lfm3_vl")
family("idefics2", "idefics3", "smolvlm", "step3p7", "minicpmv4_6", "minicpmv4_7")
family("kimi_k25", pools_time=True)
family("minicpm_ocr", "cosmos3_edge", "hyperclovax_vision_v2", "paddleocr_vl", "video_llama_3")
family("lighton_ocr", "gemma4", "gemma3n")
family("exaone4_5", "qwen4_exp", "ernie4_5_vl_moe", "dots3_note")
family("inkling2", "inkling2_loop", projector_paths=("vision_tower",))
family("gemma4_unified", vision_path="embed_vision", projector_paths=("embed_vision",))
_SAME = {"image": ("image_token_id",), "video": ("image_token_id",)}
family("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr", "glm5_next", placeholders=_SAME)
family("nemotron_h_omni", placeholders=_SAME)
family("hunyuan_vl", "hy_v4_vl", projector_paths=("vision_tower.patch_merger",))
family("deepseek_vl_hybrid", projector_paths=("aligner", "high_res_vision_proj"))
family("ovis2", projector_paths=("visual_embeddings_table",))
family("muse_glimmer", "muse_spark", projector_paths=("vision_adapter", "vision_projection"))
family("unlimited_ocr", "deepseek_ocr2", static_parameters=("image_newline", "view_separator"))


@register_adapter("molmo2")
class MolmoAdapter(DefaultAdapter):
    """Features are added to the embeddings of their placeholders, which differ by position."""

    additive = True

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, joins="add") for seam in super().seams(model))
