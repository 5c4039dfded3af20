"""`vqguard.json`: what binds the files of a guarded model together.

Schema 3 is a whole (merged) model, schema 4 a guard without its base. Both name every file that was
written with its SHA-256, and the weights with theirs. Schemas 1 and 2 are their predecessors, which
name less and are still read. The keys of each are fixed; a reader never guesses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from vqguard.adapters.storage.folder_update import finish_update
from vqguard.errors import ArtefactError, ConfigError
from vqguard.strict import StrictData
from vqguard.text_files import read_json

MANIFEST = "vqguard.json"


@dataclass(frozen=True)
class RecordedBase(StrictData):
    """The base of a guard that is kept without it."""

    source: str
    """"hub", "package", or "path" for a local folder."""
    name: str
    """Hub id, name in the registry, or the local folder's own name."""
    revision: str | None
    """The hub's commit, None elsewhere."""
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class _Manifest(StrictData):
    schema: int
    model_type: str
    site: str
    refusal_ids: tuple[int, ...]
    """The tokens of a refusal."""
    guard_sha256: str
    """Of `guard.json`, which names the checksum of the weights beside it."""


@dataclass(frozen=True, kw_only=True)
class OldMergedManifest(_Manifest):
    """A whole model, of whose weights the projector's alone are bound."""

    schema: Literal[1] = 1
    projector_sha256: str


@dataclass(frozen=True, kw_only=True)
class OldGuardOnlyManifest(_Manifest):
    """A guard without its base, whose processor is not bound."""

    schema: Literal[2] = 2
    base: RecordedBase
    config_sha256: str
    changed_sha256: str
    lora_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class MergedManifest(_Manifest):
    """A whole model."""

    schema: Literal[3] = 3
    weights_sha256: str
    """Over all tensors, as the files hold them."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every other file, by its path in the folder."""


@dataclass(frozen=True, kw_only=True)
class GuardOnlyManifest(_Manifest):
    """A guard without its base."""

    schema: Literal[4] = 4
    base: RecordedBase
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every other file, by its path in the folder."""


OldManifest: TypeAlias = OldMergedManifest | OldGuardOnlyManifest
NewManifest: TypeAlias = MergedManifest | GuardOnlyManifest
Manifest: TypeAlias = OldManifest | NewManifest
_KINDS: dict[int, type[Manifest]] = {
    1: OldMergedManifest,
    2: OldGuardOnlyManifest,
    3: MergedManifest,
    4: GuardOnlyManifest,
}


def is_guard_only(manifest: Manifest) -> bool:
    """Whether a manifest describes a guard without its base."""
    return isinstance(manifest, OldGuardOnlyManifest | GuardOnlyManifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `vqguard.json` into a draft of a folder. Raises OSError."""
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def holds_manifest(folder: Path) -> bool:
    """Whether a folder says that it is a guarded model; a save that was decided is finished."""
    finish_update(folder)
    return (folder / MANIFEST).is_file()


def last_saved(folder: Path) -> tuple[int, ...] | None:
    """What is another after each save of a folder, without reading it; None without a manifest."""
    if not holds_manifest(folder):
        return None
    try:
        marks = (folder / MANIFEST).stat()
    except OSError:
        return None
    return marks.st_dev, marks.st_ino, marks.st_size, marks.st_mtime_ns


def read_manifest(folder: Path) -> Manifest:
    """The checked content of `vqguard.json`. Raises `ArtefactError`."""
    path = folder / MANIFEST
    if not holds_manifest(folder):
        raise ArtefactError(
            f"{path} is missing: {folder} is not a guarded model, or saving it was interrupted; "
            "save it again with model.save_pretrained"
        )
    manifest = read_json(path, ArtefactError)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema not in _KINDS:
        came = schema if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            f"{path}: expected schema {' or '.join(map(str, _KINDS))}, got {came!r}; read it with "
            "the version of vqguard that wrote it"
        )
    try:
        checked = _KINDS[schema].from_dict(manifest)
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}\nSave the model again.") from error
    outside = [name for name in getattr(checked, "files", {}) if not _inside(name)]
    if outside:
        raise ArtefactError(f"{path}: {outside[0]!r} is no file of this folder; save it again")
    return checked


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and "\\" not in name
