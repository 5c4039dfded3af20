"""Public names of models, and where each leads; the types that are never guarded.

Data and look-ups by name, without torch or transformers: listing names must be instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqguard.errors import InputError
from vqguard.names import nearest_names

Status = Literal["measured", "architecture"]
Source = Literal["hub", "package", "path"]


@dataclass(frozen=True)
class ModelEntry:
    """Where a name leads.

    `status` is `measured` when the project's own reports use these weights, `architecture` when
    only the architecture is tested, with random weights. `source` says what `location` is: the id
    of a public checkpoint, an importable package of this project that ships the weights, or a
    local folder (whose `status` is `architecture`).
    """

    name: str
    model_type: str
    source: Source
    location: str
    status: Status
    note: str = ""


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

_ENTRIES: tuple[ModelEntry, ...] = (
    ModelEntry(
        "llava-tiny", "llava", "package", "vqguard.recipes.tiny", "measured", "the embedded world"
    ),
    *(ModelEntry(name, kind, "hub", place, "architecture") for name, kind, place in HUB),
)


def list_models() -> tuple[ModelEntry, ...]:
    """Every name the project knows, in the order of the registry."""
    return _ENTRIES


def resolve_model(name: str) -> ModelEntry:
    """Where `name` leads: an alias, the id of a listed checkpoint, any hub id, or a local folder.

    A folder wins over an alias only when it is written as a path (with a separator or a leading
    dot) or when no alias has that name. An unlisted id of the form `owner/name` is passed on as it
    is, with an empty `model_type`: the adapter is chosen when the model is loaded.

    Raises `InputError` for an unknown name, with the nearest known ones.
    """
    by_name = {entry.name: entry for entry in _ENTRIES}
    if name in by_name:
        return by_name[name]
    if name and Path(name).is_dir():
        return ModelEntry(name, "", "path", str(Path(name)), "architecture")
    for entry in _ENTRIES:
        if entry.source == "hub" and entry.location == name:
            return entry
    if _looks_like_path(name):
        raise InputError(
            f"no folder at {name!r}: expected a folder written by save_pretrained; check the path"
        )
    if name.count("/") == 1:
        return ModelEntry(name, "", "hub", name, "architecture")
    close = nearest_names(name, by_name, most=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise InputError(
        f"unknown model {name!r}: {hint + ' ' if hint else ''}expected a folder, a hub id "
        f"'owner/name' or one of {', '.join(by_name)}"
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not name
