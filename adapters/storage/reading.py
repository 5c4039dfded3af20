"""Guarded models from disk: the parts of a folder, checked against what binds them together."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from vqguard.adapters.registry import adapter_or_default, is_known_type
from vqguard.adapters.sizes.built import built_within, folder_numbers
from vqguard.adapters.storage import lora_files as lora
from vqguard.adapters.storage.bound_files import (
    GUARD,
    GUARD_FOLDER,
    WEIGHT_FILES,
    check_files,
    warn_of_old,
)
from vqguard.adapters.storage.closed_config import POINTER_KEY, read_config
from vqguard.adapters.storage.guard_only import check_lora, config_of, has_bound_lora, load_on_base
from vqguard.adapters.storage.left_out import judging_class, restore_class
from vqguard.adapters.storage.manifest import (
    MANIFEST,
    GuardOnlyManifest,
    Manifest,
    MergedManifest,
    OldGuardOnlyManifest,
    OldMergedManifest,
    last_saved,
    read_manifest,
)
from vqguard.adapters.storage.weight_files import (
    INDEX,
    closed_entry,
    indexed_files,
    projector_sha256,
    weights_sha256,
)
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import file_sha256
from vqguard.guard import VQGuard

_ATTEMPTS = 5
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
    folder: Path,
    base: str | os.PathLike[str] | None,
    kwargs: Mapping[str, Any],
    allow_changed: Collection[str] = (),
    *,
    language: bool = True,
) -> Loaded:
    """The model of a folder and its guard, not yet installed.

    Args:
        base: where a guard-only folder finds its base, None for what it has recorded.
        kwargs: for transformers' `from_pretrained`.
        allow_changed: names of files whose checksums are not compared; "weights" for those of a
            whole model.
        language: False leaves the language model out, where pictures do not pass through it.

    Raises:
        ArtefactError: for a folder that is not a complete guarded model.
        ChecksumError: when anything that a verdict depends on is not what was saved.
        ConfigError: for a `base` that a whole model does not need.

    Readers take no lock. When another process saves into the folder meanwhile, parts of two models
    may have been read, so it is read again.
    """
    for _ in range(_ATTEMPTS):
        before = last_saved(folder)
        try:
            loaded = _parts(folder, base, kwargs, allow_changed, language)
        except Exception:  # a file that was replaced between two looks ends in errors of any kind
            if last_saved(folder) == before:
                raise
            continue
        if last_saved(folder) == before:
            return loaded
    raise ArtefactError(
        f"{folder} was saved again each of the {_ATTEMPTS} times that it was read; load it when "
        "that is done"
    )


def _parts(
    folder: Path,
    base: str | os.PathLike[str] | None,
    kwargs: Mapping[str, Any],
    allow_changed: Collection[str],
    language: bool,
) -> Loaded:
    manifest = check_folder(folder, allow_changed)
    if isinstance(manifest, OldMergedManifest | OldGuardOnlyManifest):
        warn_of_old(folder, manifest)
    guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
    if guard.config.site != manifest.site:
        raise ChecksumError(f"{folder}: {MANIFEST} and the guard disagree about the site")
    if isinstance(manifest, GuardOnlyManifest | OldGuardOnlyManifest):
        trained = has_bound_lora(manifest)  # LoRA's weights belong to a whole model
        model = load_on_base(folder, manifest, base, kwargs, language=language or trained)
        if trained:
            model = lora.merge(model, folder / lora.FOLDER)
    elif base is not None:
        raise ConfigError(f"{folder} holds a whole model: leave base= out")
    else:
        model = _load_whole(folder, manifest, kwargs, language)
    if model.config.model_type != manifest.model_type:
        raise ChecksumError(
            f"{folder}: expected a {manifest.model_type!r} model, its config.json says "
            f"{model.config.model_type!r}"
        )
    return Loaded(model, guard, manifest.refusal_ids)


def _require_projector(folder: Path, manifest: OldMergedManifest, keys: tuple[str, ...]) -> None:
    if projector_sha256(folder, keys) != manifest.projector_sha256:
        raise ChecksumError(
            f"the projector in {folder} is not the one the guard was saved with: codes and "
            "verdicts would mean nothing; restore the weights, or save the guarded model again"
            + ("" if is_known_type(manifest.model_type) else _OTHER_ADAPTER)
        )


def check_folder(folder: Path, allow_changed: Collection[str] = ()) -> Manifest:
    """The manifest of a folder all of whose bound files are what was saved, the base apart.

    Raises `ArtefactError` and `ChecksumError`.
    """
    manifest = read_manifest(folder)
    _refuse_redirections(folder)
    if not (folder / GUARD).is_file():
        raise ArtefactError(f"{folder / GUARD} is missing: copy the whole folder, or save again")
    if file_sha256(folder / GUARD) != manifest.guard_sha256:
        raise ChecksumError(
            f"{folder / GUARD} is not the file that was saved with this model; restore it, or save "
            "the guarded model again"
        )
    if isinstance(manifest, MergedManifest | GuardOnlyManifest):
        check_files(folder, manifest, allow_changed)
    if isinstance(manifest, GuardOnlyManifest | OldGuardOnlyManifest):
        check_lora(folder, manifest)
    else:
        _check_weights(folder, manifest, allow_changed)
    return manifest


def _load_whole(
    folder: Path,
    manifest: MergedManifest | OldMergedManifest,
    kwargs: Mapping[str, Any],
    language: bool,
) -> Any:
    config = config_of(read_config(folder))
    if isinstance(manifest, MergedManifest):
        setattr(config, POINTER_KEY, closed_entry(folder))
    auto: Any = AutoModelForImageTextToText
    opened = auto if language else judging_class(config) or auto
    with built_within(folder_numbers(folder), folder):
        model = opened.from_pretrained(
            folder, config=config, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    restore_class(model)
    if hasattr(model.config, POINTER_KEY):
        delattr(model.config, POINTER_KEY)
    return model


def _check_weights(
    folder: Path, manifest: MergedManifest | OldMergedManifest, allow_changed: Collection[str]
) -> None:
    if isinstance(manifest, OldMergedManifest):
        keys = adapter_or_default(manifest.model_type).projector_keys
        _require_projector(folder, manifest, keys)
    elif WEIGHT_FILES not in allow_changed and (weights_sha256(folder) != manifest.weights_sha256):
        raise ChecksumError(
            f"the weights in {folder} are not those the guard was saved with: codes and verdicts "
            "would mean nothing; restore them, or save the guarded model again"
        )


def _refuse_redirections(folder: Path) -> None:
    """Files that would make transformers take weights from where no checksum looks."""
    if (folder / "adapter_config.json").exists():
        raise ArtefactError(
            f"{folder / 'adapter_config.json'} would load an adapter over the checked weights: "
            "load the guarded model, then the adapter with peft"
        )
    if any(folder.glob("shard-*.safetensors")):
        raise ArtefactError(
            f"{folder} holds shards of a distributed checkpoint, which would be loaded in place of "
            "the checked weights; remove them"
        )
    if (folder / INDEX).is_file():
        indexed_files(folder)
