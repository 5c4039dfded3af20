"""A guarded model's folder of an earlier version, written anew as this one writes it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vqguard.adapters.sizes.configured import CONFIG
from vqguard.adapters.storage.bound_files import (
    CHANGED,
    GUARD,
    GUARD_WEIGHTS,
    bound_sums,
    take_over,
)
from vqguard.adapters.storage.closed_config import close_config, is_closed
from vqguard.adapters.storage.folder_update import folder_update
from vqguard.adapters.storage.lora_files import FILES as LORA_FILES
from vqguard.adapters.storage.manifest import (
    MANIFEST,
    GuardOnlyManifest,
    Manifest,
    MergedManifest,
    NewManifest,
    OldGuardOnlyManifest,
    is_guard_only,
    last_saved,
    write_manifest,
)
from vqguard.adapters.storage.reading import check_folder
from vqguard.adapters.storage.weight_files import close_weights, model_places, weights_sha256
from vqguard.errors import ArtefactError
from vqguard.files import file_sha256
from vqguard.text_files import read_json

# What the processor and the tokenizer of a model may consist of.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")


def rewrite(folder: Path, output: Path) -> None:
    """Write the guarded model in `folder` into `output`, closed and bound, in its own form.

    Weights, guard and LoRA weights are copied as they are, so a guard alone needs no base. The
    processor's files in `folder` are taken for the model's own.

    Raises:
        ArtefactError: `folder` holds no complete guarded model, `ChecksumError` among them, or
            another process saved into it meanwhile.
    """
    before = last_saved(folder)
    manifest = check_folder(folder)
    alone = is_guard_only(manifest)
    with folder_update(output) as draft:
        path = draft.path
        weights = {CHANGED} if alone else {p.name for p, _ in model_places(folder).values()}
        names = weights | {GUARD, GUARD_WEIGHTS}
        names |= {n for n in LORA_FILES if alone and (folder / n).is_file()}
        names |= {p.name for pattern in _BESIDE for p in folder.glob(pattern) if p.is_file()}
        for name in sorted(names - {MANIFEST}):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, path / name)
        if last_saved(folder) != before:  # what is bound anew below must be of one model
            raise ArtefactError(f"{folder} was saved while it was copied; do it again")
        if not is_closed(read_json(path / CONFIG, ArtefactError)):
            close_config(path)
            if not alone:
                close_weights(path)
        write_manifest(path, _manifest_of(manifest, path))
        take_over(output, draft, guard_only=alone)


def _manifest_of(old: Manifest, path: Path) -> NewManifest:
    common: dict[str, Any] = {
        "model_type": old.model_type,
        "site": old.site,
        "refusal_ids": old.refusal_ids,
        "guard_sha256": file_sha256(path / GUARD),
        "files": bound_sums(path),
    }
    if isinstance(old, GuardOnlyManifest | OldGuardOnlyManifest):
        return GuardOnlyManifest(base=old.base, **common)
    return MergedManifest(weights_sha256=weights_sha256(path), **common)
