"""`vqguard.json`: what binds the files of a guarded model together.

Schema 1 is a whole (merged) model, schema 2 a guard without its base. The keys of each are fixed;
a reader never guesses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import replace_text
from vqguard.text_files import parse_json

MANIFEST = "vqguard.json"
MERGED, GUARD_ONLY = 1, 2

_TEXT, _TEXT_OR_NULL = (str,), (str, type(None))
_COMMON: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "model_type": _TEXT,
    "site": _TEXT,
    "refusal_ids": (list,),
    "guard_sha256": _TEXT,
}
_KEYS: dict[int, dict[str, tuple[type, ...]]] = {
    MERGED: {**_COMMON, "projector_sha256": _TEXT},
    GUARD_ONLY: {
        **_COMMON,
        "base": (dict,),
        "config_sha256": _TEXT,
        "changed_sha256": _TEXT,
        "lora_sha256": _TEXT_OR_NULL,
    },
}
_BASE: dict[str, tuple[type, ...]] = {
    "source": _TEXT,
    "name": _TEXT,
    "revision": _TEXT_OR_NULL,
    "weights_sha256": _TEXT,
}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it whole or not at all; last of all files. Raises OSError."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    replace_text(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of `vqguard.json`. Raises `ArtefactError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(
            f"{path} is missing: {folder} is not a guarded model, or saving it was interrupted; "
            "save it again with model.save_pretrained"
        )
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise ArtefactError(
            f"{path} is not readable JSON ({error}); save the model again"
        ) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema not in _KEYS:
        found = schema if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtefactError(
            f"{path}: expected schema {MERGED} or {GUARD_ONLY}, got {found!r}; read it with the "
            "version of vqguard that wrote it"
        )
    _check(manifest, _KEYS[schema], path)
    if not all(type(token) is int for token in manifest["refusal_ids"]):
        raise ArtefactError(f"{path}: refusal_ids must be integers; save the model again")
    if schema == GUARD_ONLY:
        _check(manifest["base"], _BASE, path)
    return dict(manifest)


def _check(found: Any, keys: dict[str, tuple[type, ...]], path: Path) -> None:
    if found.keys() != keys.keys():
        raise ArtefactError(
            f"{path}: missing keys {sorted(keys.keys() - found.keys())}, unknown keys "
            f"{sorted(found.keys() - keys.keys())}; save the model again"
        )
    wrong = [name for name, kinds in keys.items() if type(found[name]) not in kinds]
    if wrong:
        raise ArtefactError(f"{path}: {', '.join(wrong)} has the wrong type; save the model again")
