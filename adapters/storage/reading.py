"""Guarded models from disk: the parts of a folder, checked against what binds them together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from vqguard.adapters.registry import adapter_or_default, is_known_type
from vqguard.adapters.storage import lora_files as lora
from vqguard.adapters.storage.guard_only import GUARD_FOLDER, load_on_base
from vqguard.adapters.storage.manifest import (
    MANIFEST,
    GuardOnlyManifest,
    MergedManifest,
    read_manifest,
)
from vqguard.adapters.storage.weight_files import (
    INDEX,
    indexed_files,
    projector_sha256,
)
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import file_sha256
from vqguard.guard import VQGuard

_OTHER_ADAPTER = "; or import the adapter that it was saved with"


@dataclass(frozen=True)
class Loaded:
    """What a folder holds, checked.

    The model without its guard, LoRA weights merged in, the guard, and the tokens of a refusal.
    """

    model: Any
    guard: VQGuard
    refusal_ids: tuple[int, ...]


def load_parts(
    folder: Path, base: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]
) -> Loaded:
    """The model of a folder and its guard, not yet installed.

    `base`: where a guard-only folder finds its base, None for what it has recorded. `kwargs` go to
    transformers' `from_pretrained`.

    Raises:
        ArtefactError: for a folder that is not a complete guarded model.
        ChecksumError: when the guard, the projector or the base is not the one that was saved.
        ConfigError: for a `base` that a whole model does not need.
    """
    manifest = read_manifest(folder)
    _refuse_redirections(folder)
    adapter = adapter_or_default(manifest.model_type)
    guard_file = folder / GUARD_FOLDER / "guard.json"
    if not guard_file.is_file():
        raise ArtefactError(f"{guard_file} is missing: copy the whole folder, or save again")
    if file_sha256(guard_file) != manifest.guard_sha256:
        raise ChecksumError(
            f"{guard_file} is not the file that was saved with this model; restore it, or save "
            "the guarded model again"
        )
    if isinstance(manifest, MergedManifest):
        if base is not None:
            raise ConfigError(f"{folder} holds a whole model: leave base= out")
        _require_projector(folder, manifest, adapter.projector_keys)
    guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
    if guard.config.site != manifest.site:
        raise ChecksumError(f"{folder}: {MANIFEST} and the guard disagree about the site")
    if isinstance(manifest, MergedManifest):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    else:
        model = load_on_base(folder, manifest, base, kwargs)
    if model.config.model_type != manifest.model_type:
        raise ChecksumError(
            f"{folder}: expected a {manifest.model_type!r} model, its config.json says "
            f"{model.config.model_type!r}"
        )
    if isinstance(manifest, GuardOnlyManifest) and manifest.lora_sha256 is not None:
        model = lora.merge(model, folder / lora.FOLDER)
    return Loaded(model, guard, manifest.refusal_ids)


def _require_projector(folder: Path, manifest: MergedManifest, keys: tuple[str, ...]) -> None:
    if projector_sha256(folder, keys) != manifest.projector_sha256:
        raise ChecksumError(
            f"the projector in {folder} is not the one the guard was saved with: codes and "
            "verdicts would mean nothing; restore the weights, or save the guarded model again"
            + ("" if is_known_type(manifest.model_type) else _OTHER_ADAPTER)
        )


def _refuse_redirections(folder: Path) -> None:
    """Files that would make transformers take weights from where no checksum looks."""
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{folder / 'adapter_config.json'} would load an adapter over the checked weights: "
            "load the guarded model, then the adapter with peft"
        )
    if (folder / INDEX).is_file():
        indexed_files(folder)
