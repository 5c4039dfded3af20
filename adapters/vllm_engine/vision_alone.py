"""A guarded model of which only what looks at pictures is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from vqguard.adapters.base import Adapter
from vqguard.adapters.install import install_link
from vqguard.adapters.registry import adapter_or_default, get_adapter, is_known_type
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.policy_texts import policy_texts, texts_of
from vqguard.adapters.sizes.pictures import require_small_files
from vqguard.adapters.storage.manifest import MergedManifest, read_manifest
from vqguard.adapters.storage.reading import load_parts
from vqguard.errors import ConfigError, SeamError
from vqguard.guard import VQGuard

SERVED = frozenset({"qwen2_5_vl", "qwen3_vl"})
"""Types whose visual half is proven on the transformers that vLLM asks for, where the whole of
them is proven on newer ones alone: `tests/vllm_engine/test_families.py` holds it."""


def load_vision(folder: Path, device: str) -> Any:
    """The guarded model in a folder, in float32, on `device`; its language model has no weights.

    It screens and quantises; it cannot answer.

    Raises:
        ArtefactError: the folder is not a whole guarded model, or is not what was saved.
        ConfigError: its guard does not quantise, or judges nothing.
        SeamError: codes of its family are not all that its language model is shown.
    """
    manifest = read_manifest(folder)
    if not isinstance(manifest, MergedManifest):
        raise ConfigError(
            f"{folder} is no whole guarded model of this version: write one with `vqguard export "
            "RUN --output FOLDER`, without --guard-only"
        )
    require_served(manifest.model_type)
    # as the files hold it: what is only mapped from them takes no memory until it is touched
    loaded = load_parts(folder, None, {"dtype": "auto"})
    model, guard = loaded.model, loaded.guard
    adapter = get_adapter(model)
    adapter.check(model)
    _require_codes_alone(adapter, model, guard)
    for module in adapter.language_modules(model):
        module.to("meta")
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device, torch.float32)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    tokenizer = None
    if texts_of(guard.safety_map):
        require_small_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = policy_texts(guard.safety_map, tokenizer)
    guard.to(device)
    link = GuardLink(guard, adapter, loaded.refusal_ids, adapter.seams(model), None, texts)
    return install_link(model, link).eval()


def require_served(model_type: str) -> None:
    """Raise `SeamError` for types whose visual half is not proven on this transformers."""
    if model_type not in SERVED and not is_known_type(model_type):
        raise SeamError(
            f"models of type {model_type!r} are not proven on this transformers, and vLLM's "
            "workers cannot prove them: serve the folder with `vqguard serve`"
        )
    adapter_or_default(model_type)


def _require_codes_alone(adapter: Adapter, model: nn.Module, guard: VQGuard) -> None:
    """Check that a picture's codes are all that the language model needs of it."""
    if not guard.quantises:
        raise ConfigError(
            "this guard judges alone and quantises nothing, so that pictures have no codes: put "
            "`vqguard gateway` in front of the engine instead"
        )
    if guard.safety_map is None:
        raise ConfigError("this guard has no safety map: calibrate it, and export it again")
    if guard.config.site != "projected":
        raise SeamError(
            f"codewords of site {guard.config.site!r} still have to pass a projector, and vLLM's "
            "workers have none: retrofit with guard.site=projected"
        )
    seams = [seam for seam in adapter.seams(model) if seam.modality == "image"]
    joined = len(seams) == 1 and not seams[0].inner and seams[0].joins == "replace"
    if not joined or adapter.additive or adapter.static_vectors(model) is not None:
        raise SeamError(
            f"{type(adapter).__name__}: the language model is shown more than one codeword a "
            "placeholder; serve the folder with `vqguard serve`"
        )
