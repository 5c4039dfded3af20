"""`vqguard.json`: what binds the files of a guarded model together.

Schema 1 is a whole (merged) model, schema 2 a guard without its base. The keys of each are fixed;
a reader never guesses.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import replace_text
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
class MergedManifest(_Manifest):
    """A whole model."""

    schema: Literal[1] = 1
    projector_sha256: str


@dataclass(frozen=True, kw_only=True)
class GuardOnlyManifest(_Manifest):
    """A guard without its base."""

    schema: Literal[2] = 2
    base: RecordedBase
    config_sha256: str
    changed_sha256: str
    lora_sha256: str | None


Manifest: TypeAlias = MergedManifest | GuardOnlyManifest
_KINDS: dict[int, type[Manifest]] = {1: MergedManifest, 2: GuardOnlyManifest}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it whole or not at all; last of all files. Raises OSError."""
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n"
    replace_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> Manifest:
    """The checked content of `vqguard.json`. Raises `ArtefactError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            f"{path} is missing: {folder} is not a guarded model, or saving it was interrupted; "
            "save it again with model.save_pretrained"
        )
    manifest = read_json(path, ArtefactError)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema not in _KINDS:
        found = schema if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            f"{path}: expected schema {' or '.join(map(str, _KINDS))}, got {found!r}; read it with "
            "the version of vqguard that wrote it"
        )
    try:
        return _KINDS[schema].from_dict(manifest)
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}\nSave the model again.") from error
