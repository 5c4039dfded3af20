"""Public checkpoints by short names: data, imported without torch."""

from __future__ import annotations

HUB: tuple[tuple[str, str, str], ...] = (
    ("llava-1.5", "llava", "llava-hf/llava-1.5-7b-hf"),
    ("llava-1.5-7b", "llava", "llava-hf/llava-1.5-7b-hf"),
    ("llava-1.5-13b", "llava", "llava-hf/llava-1.5-13b-hf"),
    ("llava-next", "llava_next", "llava-hf/llava-v1.6-mistral-7b-hf"),
    ("llava-next-7b", "llava_next", "llava-hf/llava-v1.6-mistral-7b-hf"),
    ("llava-next-13b", "llava_next", "llava-hf/llava-v1.6-vicuna-13b-hf"),
    ("llava-next-8b", "llava_next", "llava-hf/llama3-llava-next-8b-hf"),
    ("llava-next-video", "llava_next_video", "llava-hf/LLaVA-NeXT-Video-7B-hf"),
    ("llava-onevision", "llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    ("video-llava", "video_llava", "LanguageBind/Video-LLaVA-7B-hf"),
    ("vip-llava", "vipllava", "llava-hf/vip-llava-7b-hf"),
    ("qwen2-vl", "qwen2_vl", "Qwen/Qwen2-VL-7B-Instruct"),
    ("qwen2.5-vl", "qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ("qwen3-vl", "qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct"),
    ("qwen3-vl-moe", "qwen3_vl_moe", "Qwen/Qwen3-VL-30B-A3B-Instruct"),
    ("qwen3.5", "qwen3_5", "Qwen/Qwen3.5-27B"),
    ("instructblip", "instructblip", "Salesforce/instructblip-vicuna-7b"),
    ("instructblip-13b", "instructblip", "Salesforce/instructblip-vicuna-13b"),
    ("blip-2", "blip-2", "Salesforce/blip2-opt-2.7b"),
    ("internvl3", "internvl", "OpenGVLab/InternVL3-1B-hf"),
    ("gemma-3", "gemma3", "google/gemma-3-4b-it"),
    ("gemma-4", "gemma4", "google/gemma-4-E2B-it"),
    ("smolvlm2", "smolvlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct"),
    ("idefics2", "idefics2", "HuggingFaceM4/idefics2-8b"),
    ("idefics3", "idefics3", "HuggingFaceM4/Idefics3-8B-Llama3"),
    ("llama-3.2-vision", "mllama", "meta-llama/Llama-3.2-11B-Vision-Instruct"),
    ("mistral-small-3.1", "mistral3", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    ("glm-4.1v", "glm4v", "zai-org/GLM-4.1V-9B-Thinking"),
    ("florence-2", "florence2", "florence-community/Florence-2-base"),
    ("kosmos-2", "kosmos-2", "microsoft/kosmos-2-patch14-224"),
    ("molmo2", "molmo2", "allenai/Molmo2-8B"),
)
"""(name, `config.model_type`, id of the checkpoint). The first name of a checkpoint leads."""

REFUSED = {
    "diffusion_gemma": "its generate writes blocks of tokens at once, where a refusal cannot be "
    "carried out row by row",
    "inkling_mm_model": "its features come patch by patch, and nothing tells which patches are one "
    "picture, so that no picture has a verdict",
    "pi0": "it answers with robot actions, not with text that could refuse",
}
"""Types that see pixels and are not guarded, with the reason."""
