"""A guard without its base: what a guarded model has that its base has not.

    vqguard.json         what binds the files; the base's name and the checksum of its weights
    guard/               codebooks and safety map
    changed.safetensors  every tensor in which the model differs from its base: the projector, and
                         the language model where it was not trained with LoRA
    lora/                LoRA weights, where the model carries them (PEFT's own files)
    config.json, …       the model's configuration, closed as a whole model's is

Nothing is assumed about what training changed: every tensor is compared with the base's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, GenerationConfig

from vqguard.adapters.runtime.guard_link import link_of
from vqguard.adapters.seams import original_method
from vqguard.adapters.sizes.built import built_within, numbers_held
from vqguard.adapters.sizes.configured import CONFIG, GENERATION
from vqguard.adapters.storage import lora_files as lora
from vqguard.adapters.storage.base_model import BaseModel, find_base, recorded_base
from vqguard.adapters.storage.bound_files import (
    CHANGED,
    take_over,
    write_guard,
)
from vqguard.adapters.storage.closed_config import read_config
from vqguard.adapters.storage.folder_update import folder_update
from vqguard.adapters.storage.left_out import judging_class, require_whole, restore_class
from vqguard.adapters.storage.manifest import (
    GuardOnlyManifest,
    OldGuardOnlyManifest,
    write_manifest,
)
from vqguard.adapters.storage.weight_files import model_places, read_tensor
from vqguard.errors import ArtefactError, ChecksumError
from vqguard.files import DRAFT, file_sha256

_SHARED = 0.01  # of its elements a model has at least in common with its base
Tensors = Mapping[str, Callable[[], Tensor]]


def save_guard_only(
    model: Any,
    save_directory: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    processor: Any = None,
) -> None:
    """Write what `model` has that `base` has not; `load_guarded` puts both together again, exactly.

    Args:
        model: guarded, on any device; with one LoRA adapter of PEFT over it or without.
        save_directory: made if missing; may hold an earlier artefact of this kind, which is
            replaced. Files of anybody else are neither overwritten nor deleted.
        base: the model it was made from: a registered name, a folder, or `hub:owner/name`.
        processor: written beside it, so that the folder is all a user needs besides the base.

    The whole model is written to a temporary folder inside `save_directory` on the way, under the
    names that checkpoints use. When the save fails, what was in the folder before stays.

    Raises:
        SeamError: for a model that is not guarded.
        ArtefactError: when the base has other tensors or the folder holds anything else by these
            names.
        ConfigError: for PEFT adapters other than LoRA.
    """
    inner = lora.base_of(model)
    require_whole(inner)
    link = link_of(inner)
    folder = Path(save_directory)
    original = find_base(base)
    state = {
        name: tensor
        for name, tensor in lora.own_state(inner).items()
        if not name.startswith("vqguard.")
    }
    with folder_update(folder) as draft:
        path = draft.path
        with tempfile.TemporaryDirectory(dir=folder, prefix=DRAFT) as scratch:
            whole = Path(scratch)
            original_method(inner, "save_pretrained")(whole, state_dict=dict(state))
            places = model_places(whole)
            saved = {name: partial(read_tensor, place) for name, place in places.items()}
            kept = {name: partial(_get, state, name) for name in state}
            save_file(_changed(_named_like(original, saved, kept), original), path / CHANGED)
            for name in (CONFIG, GENERATION):
                if (whole / name).is_file():
                    (whole / name).rename(path / name)
        lora.save(model, path / lora.FOLDER)
        bound = write_guard(path, inner, link, processor)
        write_manifest(path, GuardOnlyManifest(**bound, base=original.describe()))
        take_over(folder, draft, guard_only=True)


def load_on_base(
    folder: Path,
    manifest: GuardOnlyManifest | OldGuardOnlyManifest,
    base: str | os.PathLike[str] | None,
    kwargs: Mapping[str, Any],
    *,
    language: bool = True,
) -> Any:
    """The unguarded model of a guard-only folder: the base's tensors, the changed ones in place.

    `kwargs` go to `from_pretrained`; `language` as for `load_parts`. Raises `ArtefactError` and
    `ChecksumError`.
    """
    original = recorded_base(manifest.base, base)
    config = config_of(read_config(folder))
    state: dict[str, Tensor] = {}
    files = dict.fromkeys(path for path, _ in model_places(original.folder).values())
    held = numbers_held([*files, folder / CHANGED])
    for path in files:
        state |= load_file(path)
    changed = load_file(folder / CHANGED)
    unknown = sorted(changed.keys() - state.keys())
    if unknown:
        raise ArtefactError(f"{folder / CHANGED} changes what the base has not: {unknown[:3]}")
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    cls = whole if language else judging_class(config) or whole
    with built_within(held, folder):
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=state | changed,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **kwargs,
        )
    restore_class(model)
    lacking = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])})
    if lacking:
        raise ArtefactError(
            f"{original.folder} and {folder / CHANGED} together lack {lacking[:3]}, which would be "
            "random; load them with the version of transformers that wrote them"
        )
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def config_of(described: dict[str, Any]) -> Any:
    """The configuration that `read_config` read, as transformers' class. Raises `ArtefactError`."""
    kind = described["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ArtefactError(
            f"this transformers has no model type {kind!r}: install one that has, or import the "
            "package that registers it"
        )
    try:
        config: Any = CONFIG_MAPPING[kind].from_dict(described)
    except Exception as error:  # each class checks what it likes, in its own way
        raise ArtefactError(
            f"config.json is none of a {kind!r} model ({error}); restore the file"
        ) from error
    return config


def has_bound_lora(manifest: GuardOnlyManifest | OldGuardOnlyManifest) -> bool:
    """Whether a manifest binds LoRA weights."""
    if isinstance(manifest, OldGuardOnlyManifest):
        return manifest.lora_sha256 is not None
    return set(lora.FILES) <= manifest.files.keys()


def check_lora(folder: Path, manifest: GuardOnlyManifest | OldGuardOnlyManifest) -> None:
    """Refuse LoRA weights that were not saved with a guard; of an old manifest, check all it binds.

    Raises `ChecksumError`.
    """
    if isinstance(manifest, GuardOnlyManifest):
        there = any((folder / name).exists() for name in lora.FILES)
        if there and not has_bound_lora(manifest):
            raise ChecksumError(f"{folder / lora.FOLDER} was not saved with this guard; remove it")
        return
    for name, checksum in ((CHANGED, manifest.changed_sha256), (CONFIG, manifest.config_sha256)):
        if file_sha256(folder / name) != checksum:
            raise ChecksumError(
                f"{folder / name} is not the file that was saved with this guard; restore it"
            )
    if lora.sha256(folder / lora.FOLDER) != manifest.lora_sha256:
        raise ChecksumError(
            f"{folder / lora.FOLDER} is not what was saved with this guard; restore it"
        )


def _named_like(base: BaseModel, saved: Tensors, kept: Tensors) -> Tensors:
    """The model's tensors under the names of the base's files.

    `saved`: as transformers would write them; `kept`: as the model has them.
    """
    names = model_places(base.folder).keys()
    if saved.keys() <= names:
        return saved
    here = {name: read for name, read in kept.items() if name in names}
    # Tied weights are in the model twice and in files once.
    stored = {read().data_ptr() for read in here.values()}
    if all(read().data_ptr() in stored for name, read in kept.items() if name not in names):
        return here
    raise ArtefactError(
        f"the base in {base.folder} has other tensors than the model: it lacks "
        f"{sorted(saved.keys() - names)[:3]}. Name the model that was guarded, or save that model "
        "with save_pretrained and name the folder"
    )


def _changed(tensors: Tensors, base: BaseModel) -> dict[str, Tensor]:
    places = model_places(base.folder)
    changed: dict[str, Tensor] = {}
    elements = 0
    for name, read in tensors.items():
        tensor, before = read().detach().cpu(), read_tensor(places[name])
        # What was loaded in another dtype is unchanged if the base, cast likewise, is the same.
        if tensor.shape != before.shape or not torch.equal(before.to(tensor.dtype), tensor):
            changed[name] = tensor.contiguous()
        elements += tensor.numel()
    if sum(tensor.numel() for tensor in changed.values()) > (1 - _SHARED) * elements:
        raise ArtefactError(
            f"the model shares next to nothing with the weights in {base.folder}, though training "
            "leaves the vision encoder as it is: that is not the base it was made from. Name the "
            "right one, or save the whole model with save_pretrained"
        )
    return changed


def _get(state: Mapping[str, Tensor], name: str) -> Tensor:
    return state[name]
