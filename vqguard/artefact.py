"""A guard on disk: `guard.json` and `guard.safetensors`, nothing that can execute.

`guard.json` holds schema, configuration, safety map, the codebooks' checksums and the weight file's
SHA-256; the weight file's header holds the SHA-256 of configuration and map. Files of two different
guards are therefore refused. Checksums find accidents and careless edits. They are no signature:
whoever can write both files can write a guard of their own.

Both files are written beside their place, flushed, and then renamed: a full disk or a crash while
writing leaves the previous guard as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from vqguard.config import GuardConfig
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError
from vqguard.safety_map import SafetyMap
from vqguard.search import Calibration
from vqguard.strict import parse_json

if TYPE_CHECKING:
    from vqguard.guard import VQGuard

SCHEMA = 1
JSON_NAME = "guard.json"
WEIGHTS_NAME = "guard.safetensors"
_JSON_LIMIT = 256 * 2**20
_KEYS = {"schema", "config", "checksums", "safety_map"}
_OPTIONAL = {"calibration"}
_LEVELS: tuple[Literal["patch", "semantic"], ...] = ("patch", "semantic")
_CHECKSUMS = {"weights_file", "patch", "semantic"}


def save_guard(guard: VQGuard, directory: str | os.PathLike[str]) -> None:
    """Write `guard` into `directory`, which is made if missing; a guard there is replaced.

    Raises OSError when the disk is full or not writable; the previous guard then survives.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {
        "config": guard.config.to_dict(),
        "safety_map": None if guard.safety_map is None else guard.safety_map.to_dict(),
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in guard.state_dict().items()
    }
    weights = serialise(tensors, metadata={"described_sha256": _described_sha256(described)})
    document = {
        "schema": SCHEMA,
        **described,
        "checksums": {
            "weights_file": hashlib.sha256(weights).hexdigest(),
            "patch": guard.checksum("patch"),
            "semantic": guard.checksum("semantic"),
        },
    }
    measured = {
        level: calibration.to_dict()
        for level in _LEVELS
        if (calibration := getattr(guard, level).calibration) is not None
    }
    if measured:
        # which back end is fastest: no answer depends on it, so no checksum covers it
        document["calibration"] = measured
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_files({folder / WEIGHTS_NAME: weights, folder / JSON_NAME: text.encode()})


def replace_files(contents: dict[Path, bytes]) -> None:
    """Write files so that none changes before all are on the disk. Raises OSError."""
    drafts: dict[Path, Path] = {}
    try:
        for place, content in contents.items():
            handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
            drafts[place] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files for their owner only; a guard is as readable as other files
            drafts[place].chmod(0o666 & ~_umask())
        for place, draft in drafts.items():
            draft.replace(place)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def load_guard(directory: str | os.PathLike[str]) -> VQGuard:
    """Read and check the guard in `directory`; it comes back in eval mode on the CPU.

    Raises ArtefactError, ChecksumError among them, naming the file and what to do.
    """
    from vqguard.guard import VQGuard

    folder = Path(directory)
    document = _read_document(folder)
    path = folder / WEIGHTS_NAME
    try:
        weights = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error}; copy the whole directory") from error
    if hashlib.sha256(weights).hexdigest() != document["checksums"]["weights_file"]:
        raise ChecksumError(
            f"{path} is not the file that {JSON_NAME} was written with (truncated, replaced or"
            " edited); restore both files from one save"
        )
    try:
        config = GuardConfig.from_dict(document["config"])
    except ConfigError as error:
        raise ArtefactError(f"{folder / JSON_NAME}: {error}") from error
    tensors, header = _read_tensors(weights, path)
    described = {"config": document["config"], "safety_map": document["safety_map"]}
    if header.get("described_sha256") != _described_sha256(described):
        raise ChecksumError(
            f"{folder / JSON_NAME} is not the one that {WEIGHTS_NAME} was written with; its"
            " configuration or safety map was edited. Restore it, or change the guard in Python and"
            " save it again"
        )
    guard = VQGuard(config)
    _check_tensors(tensors, guard.state_dict(), path)
    guard.load_state_dict(tensors)
    for level in _LEVELS:
        if guard.checksum(level) != document["checksums"][level]:
            raise ChecksumError(f"{path}: the {level} codebook does not match {JSON_NAME}")
    if document["safety_map"] is not None:
        try:
            guard.safety_map = SafetyMap.from_dict(document["safety_map"])
        except (ConfigError, InputError) as error:
            raise ArtefactError(f"{folder / JSON_NAME}: {error}") from error
    measured = document.get("calibration")
    if isinstance(measured, dict):
        for level in _LEVELS:
            getattr(guard, level).calibration = Calibration.from_dict(measured.get(level))
    return guard.eval()


def _read_document(folder: Path) -> dict[str, Any]:
    path = folder / JSON_NAME
    if not path.is_file():
        raise ArtefactError(
            f"{path} does not exist: expected a local directory that VQGuard.save_pretrained wrote"
        )
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ArtefactError(f"{path} is larger than {_JSON_LIMIT} bytes; it is not a guard's")
        document = parse_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ArtefactError(
            f"cannot read {path}: {error}; restore it from a copy or save the guard again"
        ) from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else None
        raise ArtefactError(
            f"{path} has schema {schema!r}, this version of vqguard reads {SCHEMA}; install the"
            " version that wrote it"
        )
    checksums = document.get("checksums")
    if (
        set(document) - _OPTIONAL != _KEYS
        or not isinstance(checksums, dict)
        or set(checksums) != _CHECKSUMS
    ):
        raise ArtefactError(
            f"{path}: expected the keys {sorted(_KEYS)} with checksums of {sorted(_CHECKSUMS)}, got"
            f" {sorted(document)}; restore it from a copy"
        )
    return document


def _read_tensors(weights: bytes, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata out of the very bytes whose checksum was compared."""
    try:
        tensors = deserialise(weights)
        size = int.from_bytes(weights[:8], "little")
        header = parse_json(weights[8 : 8 + size].decode("utf-8"), str(path))
    except (SafetensorError, ConfigError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is not a safetensors file: {error}; restore it") from error
    return tensors, header.get("__metadata__", {})


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    if tensors.keys() != expected.keys():
        raise ArtefactError(
            f"{path}: expected the tensors {sorted(expected)}, got {sorted(tensors)}"
        )
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ArtefactError(
                f"{path}: {name} is {tuple(tensor.shape)} {tensor.dtype}, the configuration asks"
                f" for {tuple(wanted.shape)} {wanted.dtype}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtefactError(f"{path}: {name} holds NaN or infinity; the guard is unusable")


def _described_sha256(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
