"""Which files of a folder belong to a guarded model, and what binds them.

They are written together, bound by checksums and replaced together; no others are touched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.sizes.configured import CONFIG, GENERATION
from vqguard.adapters.storage.closed_config import close_config
from vqguard.adapters.storage.folder_update import Draft
from vqguard.adapters.storage.lora_files import FILES as LORA_FILES
from vqguard.adapters.storage.manifest import (
    MANIFEST,
    NewManifest,
    OldGuardOnlyManifest,
    OldManifest,
    OldMergedManifest,
    holds_manifest,
    is_guard_only,
    read_manifest,
)
from vqguard.adapters.storage.weight_files import INDEX, WEIGHTS, indexed_files
from vqguard.errors import ArtefactError, ChecksumError
from vqguard.files import file_sha256

GUARD_FOLDER = "guard"
GUARD = f"{GUARD_FOLDER}/guard.json"
GUARD_WEIGHTS = f"{GUARD_FOLDER}/guard.safetensors"
CHANGED = "changed.safetensors"
WEIGHT_FILES = "weights"
"""What the weights are called among the names of `allow_changed`."""

# The names that a save gives to whole weights, in one file or in shards.
_CLOSED = re.compile(r"guarded(-\d{5}-of-\d{5})?\.safetensors")
# How answers are sampled is the user's to change; no verdict depends on it.
_FREE = frozenset({GENERATION})
# What transformers prepares pixels by. One that is not bound would decide what the guard sees.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def bound_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a draft, but for whole weights, which are bound by their tensors."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    # guard.json binds its own weights
    left_out = {MANIFEST, GUARD, GUARD_WEIGHTS}
    return {
        name: file_sha256(path)
        for name, path in named.items()
        if name not in left_out and not _is_weights(name)
    }


def write_guard(path: Path, model: Any, link: GuardLink, processor: Any) -> dict[str, Any]:
    """Write the guard beside the weights in a draft; returns what every manifest says of it.

    Comes last, because it binds what is there: the configuration is closed, and the processor, if
    there is one, is written on the way.
    """
    close_config(path)
    link.guard.save_pretrained(path / GUARD_FOLDER)
    if processor is not None:
        processor.save_pretrained(path)
    return {
        "model_type": model.config.model_type,
        "site": link.guard.config.site,
        "refusal_ids": tuple(link.refusal_ids),
        "guard_sha256": file_sha256(path / GUARD),
        "files": bound_sums(path),
    }


def own_files(folder: Path) -> set[str]:
    """The files in `folder` that an earlier save of a guarded model wrote; none without one.

    Raises:
        ArtefactError: for a manifest that cannot be read.
    """
    if not holds_manifest(folder):
        return set()
    manifest = read_manifest(folder)
    names = {MANIFEST, GUARD, GUARD_WEIGHTS, CONFIG, GENERATION, *getattr(manifest, "files", {})}
    if isinstance(manifest, OldGuardOnlyManifest):
        names |= {CHANGED, *LORA_FILES}
    elif isinstance(manifest, OldMergedManifest):
        names |= {WEIGHTS, INDEX}
        names |= set(indexed_files(folder)) if (folder / INDEX).is_file() else set()
    # a copy that somebody made beside them is not ours
    names |= {path.name for path in folder.iterdir() if _CLOSED.fullmatch(path.name)}
    return {name for name in names if (folder / name).is_file()}


def take_over(folder: Path, draft: Draft, *, guard_only: bool) -> None:
    """Let `draft` replace the guarded model of its kind in `folder`, and nothing else.

    Raises:
        ArtefactError: it would overwrite, or stand beside, what somebody else put there.
    """
    owned = own_files(folder)
    if owned and is_guard_only(read_manifest(folder)) != guard_only:
        raise ArtefactError(
            f"{folder} holds another model: a guarded one that is "
            f"{'whole' if guard_only else 'without its base'}; name an empty folder"
        )
    foreign = sorted(
        name
        for name in draft.names() - owned
        if (folder / name).exists() and _differs(folder / name, draft.path / name)
    )
    weights = {path.name for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)}
    strangers = sorted({*foreign, *(weights - owned - draft.names())})
    if strangers:
        raise ArtefactError(
            f"{folder} holds files that no guarded model wrote ({', '.join(strangers[:5])}), the "
            "weights of another model perhaps; nothing was changed. Name an empty folder"
        )
    draft.removed = owned


def check_files(
    folder: Path, manifest: NewManifest, allowed: Collection[str] = frozenset()
) -> None:
    """Compare a folder's files with what its manifest binds; warn of what it does not bind.

    Args:
        allowed: names whose checksums are not compared.

    Raises:
        ChecksumError: one is another.
        ArtefactError: one is missing.
    """
    bound = manifest.files
    for name, expected in bound.items():
        if name in _FREE or name in allowed:
            continue
        if not (folder / name).is_file():
            raise ArtefactError(f"{folder / name} is missing: copy the whole folder")
        if file_sha256(folder / name) != expected:
            raise ChecksumError(
                f"{folder / name} is not the file that was saved with this guard: verdicts were "
                "calibrated with that one. Restore it, or calibrate and save the model again"
                + (f"; allow_changed=({name!r},) takes it as it is" if name != CHANGED else "")
            )
    extra = [name for name in PROCESSOR_FILES if (folder / name).is_file() and name not in bound]
    if any(name in bound for name in PROCESSOR_FILES):
        smuggled = [name for name in extra if name not in allowed]
        if smuggled:
            raise ChecksumError(
                f"{folder / smuggled[0]} was not saved with this guard and would change what it "
                "sees; remove it, or save the model again with save_pretrained(folder, processor=)"
            )
    elif extra:
        warnings.warn(
            f"{folder / extra[0]} is bound by no checksum: it was written after the guarded model. "
            "Save both together, with save_pretrained(folder, processor=processor)",
            stacklevel=2,
        )


def warn_of_old(folder: Path, manifest: OldManifest) -> None:
    """Say what an old manifest does not bind."""
    left = "the processor's files" if is_guard_only(manifest) else (
        "weights other than the projector's, config.json, the processor's files"
    )  # fmt: skip
    opens = "" if is_guard_only(manifest) else (
        ", and loaders that do not know vqguard open it without its guard"
    )  # fmt: skip
    warnings.warn(
        f"{folder} was written by an earlier vqguard: no checksum covers {left}{opens}. Rewrite it "
        f"with `vqguard export {folder} --output NEW`",
        stacklevel=2,
    )


_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "model*.bin")


def _is_weights(name: str) -> bool:
    return _CLOSED.fullmatch(name) is not None


def _differs(there: Path, new: Path) -> bool:
    return not there.is_file() or file_sha256(there) != file_sha256(new)
