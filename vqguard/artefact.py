"""A guard on disk: `guard.json` and `guard.safetensors`, nothing that can execute.

`guard.json` holds schema, configuration, safety map, the codebooks' checksums and the weight file's
SHA-256; the weight file's header holds the SHA-256 of configuration and map. Files of two different
guards are therefore refused. Checksums find accidents and careless edits. They are no signature:
whoever can write both files can write a guard of their own.

Both files are written beside their place, flushed, and then renamed, `guard.json` first: until
then the guard is the previous one, and from then on the new one, whose weights are found where they
were written.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor

from vqguard.bounded import read_bytes
from vqguard.config import GuardConfig
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError
from vqguard.files import DRAFT, replace_files, text_sha256
from vqguard.safety_map import SafetyMap
from vqguard.search import Calibration
from vqguard.strict import StrictData
from vqguard.text_files import MAX_DOCUMENT, parse_json, read_json

SCHEMA = 1
JSON_NAME = "guard.json"
WEIGHTS_NAME = "guard.safetensors"
MAX_WEIGHTS = 4 * 2**30
"""Bytes of `guard.safetensors`. The paper's 16 000 entries, 8 192 wide, with three deep-stack
levels, have 2.1 GB."""
MAX_HEADER = 2**20
"""Bytes of its header; a guard's has some hundred for each of its tensors."""
_BYTES = 4  # of a number, float32
Level: TypeAlias = Literal["patch", "semantic"]
LEVELS: tuple[Level, ...] = ("patch", "semantic")
JudgeLevel: TypeAlias = Literal["semantic", "regional"]


@dataclass(frozen=True)
class _Checksums(StrictData):
    weights_file: str
    patch: str
    semantic: str
    regional: str | None = None


@dataclass(frozen=True)
class _GuardFile(StrictData):
    """`guard.json`. Configuration and map stay as written, which is what their checksum covers."""

    schema: Literal[1]
    config: dict[str, Any]
    safety_map: dict[str, Any] | None
    checksums: _Checksums
    calibration: Any = None


class GuardParts(NamedTuple):
    """What a guard on disk is made of."""

    config: GuardConfig
    tensors: dict[str, Tensor]
    """The guard's `state_dict`, on the CPU."""
    checksums: dict[Level | JudgeLevel, str]
    """SHA-256 of each level's codewords."""
    safety_map: SafetyMap | None
    calibrations: dict[Level, Calibration]
    """Which back end of the search is fastest, for the levels where it was measured."""


def levels(config: GuardConfig) -> tuple[Level | JudgeLevel, ...]:
    """The levels whose checksums are recorded."""
    return LEVELS if config.judge == "global" else (*LEVELS, "regional")


def write_parts(parts: GuardParts, directory: str | os.PathLike[str]) -> None:
    """Write a guard into `directory`, which is made if missing; a guard there is replaced.

    Raises:
        OSError: when the disk is full or not writable; the previous guard then survives.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {
        "config": parts.config.to_dict(),
        "safety_map": None if parts.safety_map is None else parts.safety_map.to_dict(),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.tensors.items()}
    weights = serialise(tensors, metadata={"described_sha256": _described_sha256(described)})
    checksums: dict[str, str] = {"weights_file": hashlib.sha256(weights).hexdigest()}
    document = {"schema": SCHEMA, **described, "checksums": checksums | dict(parts.checksums)}
    if parts.calibrations:
        # which back end is fastest: no answer depends on it, so no checksum covers it
        document["calibration"] = {
            level: calibration.to_dict() for level, calibration in parts.calibrations.items()
        }
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start - 20 : error.start + 20]
        raise InputError(
            f"a name in the safety map holds half a character ({half!r}), which no file can; "
            "give the category another name"
        ) from error
    if len(content) > MAX_DOCUMENT or len(weights) > MAX_WEIGHTS:
        raise ArtefactError(
            f"{folder}: a guard whose {JSON_NAME} has {len(content):,} bytes (at most"
            f" {MAX_DOCUMENT:,}) and {WEIGHTS_NAME} {len(weights):,} (at most {MAX_WEIGHTS:,})"
            " could not be read again; use fewer entries or categories"
        )
    _finish(folder)
    following = _following(folder, checksums["weights_file"])
    replace_files({following: weights})
    replace_files({folder / JSON_NAME: content})  # decides whose the weights are
    following.replace(folder / WEIGHTS_NAME)


def read_parts(directory: str | os.PathLike[str]) -> GuardParts:
    """Read the guard in `directory`; that its two files belong together is checked here.

    Raises ArtefactError, ChecksumError among them, naming the file and what to do.
    """
    folder = Path(directory)
    document = _read_document(folder)
    path = folder / WEIGHTS_NAME
    try:
        config = GuardConfig.from_dict(document.config)
    except ConfigError as error:
        raise ArtefactError(f"{folder / JSON_NAME}: {error}") from error
    wanted = _codebook_bytes(config)
    if wanted > MAX_WEIGHTS:
        raise ArtefactError(
            f"{folder / JSON_NAME} asks for codebooks of {wanted:,} bytes, at most {MAX_WEIGHTS:,}"
            " are read; restore it from a copy"
        )
    weights = _weights_of(document, folder, wanted + 8 + MAX_HEADER)
    if weights is None:
        raise ChecksumError(
            f"{path} is not the file that {JSON_NAME} was written with (truncated, replaced or"
            " edited); restore both files from one save"
        )
    tensors, header = _read_tensors(weights, path)
    # before a guard of that size is made: the configuration may name any number
    if len(weights) < wanted or len(tensors) < config.deepstack_levels:
        raise ArtefactError(
            f"{path} has {len(tensors)} tensors in {len(weights):,} bytes, the configuration in"
            f" {JSON_NAME} asks for codebooks of {wanted:,}; restore both files from one save"
        )
    described = {"config": document.config, "safety_map": document.safety_map}
    try:
        if header.get("described_sha256") != _described_sha256(described):
            raise ChecksumError(
                f"{folder / JSON_NAME} is not the one that {WEIGHTS_NAME} was written with; its"
                " configuration or safety map was edited. Restore it, or change the guard in Python"
                " and save it again"
            )
        recorded = document.safety_map
        safety_map = None if recorded is None else SafetyMap.from_dict(recorded)
    except ChecksumError:
        raise
    except (ArtefactError, InputError) as error:
        raise ArtefactError(f"{folder / JSON_NAME}: {error}") from error
    recorded_checksums = document.checksums.to_dict()
    checksums = {level: recorded_checksums[level] or "" for level in levels(config)}
    calibrations = _calibrations(document.calibration)
    return GuardParts(config, tensors, checksums, safety_map, calibrations)


def _weights_of(document: _GuardFile, folder: Path, most: int) -> bytes | None:
    """The bytes that `guard.json` names; None where no file has them.

    A save that ended behind its decision has left them beside the weights that they replace, and a
    save that goes on puts them in place at any moment.
    """
    expected, place = document.checksums.weights_file, folder / WEIGHTS_NAME
    following = _following(folder, expected)
    for path in (place, following, place):
        if not path.is_file() and (path is following or following.is_file()):
            continue
        weights = read_bytes(path, most, ArtefactError)
        if hashlib.sha256(weights).hexdigest() == expected:
            return weights
    return None


def _following(folder: Path, weights_sha256: str) -> Path:
    """Where weights wait for the `guard.json` that names them."""
    return folder / f"{DRAFT}{text_sha256(weights_sha256)[:16]}.safetensors"


def _finish(folder: Path) -> None:
    """Put in place what a save that was killed has decided: the next one decides anew."""
    if not any(folder.glob(f"{DRAFT}*.safetensors")):
        return
    with suppress(ArtefactError, FileNotFoundError):  # a damaged guard is replaced
        document = _read_document(folder)
        following = _following(folder, document.checksums.weights_file)
        following.replace(folder / WEIGHTS_NAME)


def require_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Check the names, shapes and dtypes of `tensors`, which the file `path` held.

    Raises:
        ArtefactError: unless they are the expected ones, with only finite values.
    """
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


def _read_document(folder: Path) -> _GuardFile:
    path = folder / JSON_NAME
    if not path.is_file():
        raise ArtefactError(
            f"{path} does not exist: expected a local directory that VQGuard.save_pretrained wrote"
        )
    document = read_json(path, ArtefactError)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        schema = document.get("schema") if isinstance(document, dict) else None
        raise ArtefactError(
            f"{path} has schema {schema!r}, this version of vqguard reads {SCHEMA}; install the"
            " version that wrote it"
        )
    try:
        return _GuardFile.from_dict(document)
    except ConfigError as error:
        raise ArtefactError(
            f"{path}: expected the keys of a guard and no others. Restore it from a copy. {error}"
        ) from error


def _codebook_bytes(config: GuardConfig) -> int:
    """What the codewords and their counts take in the weight file."""
    patch_levels = config.deepstack_levels + 1
    numbers = patch_levels * config.patch_entries * config.patch_dim
    numbers += config.semantic_codes * config.semantic_dim
    counts = patch_levels * config.patch_entries + config.semantic_codes
    if config.judge == "regional":
        sizes = config.regional
        numbers += sizes.hidden * (config.patch_dim + sizes.hidden + 2)
        numbers += sizes.width * (sizes.hidden + 1)
        numbers += sizes.codes * sizes.width
        counts += sizes.codes
    # beside each codeword its count, int64
    return _BYTES * numbers + 8 * counts


def _read_tensors(weights: bytes, path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata out of the very bytes whose checksum was compared."""
    size = int.from_bytes(weights[:8], "little")
    if size > MAX_HEADER:
        raise ArtefactError(
            f"{path} has a header of {size:,} bytes, at most {MAX_HEADER:,} are read; restore it"
        )
    try:
        tensors = deserialise(weights)
        header = parse_json(weights[8 : 8 + size].decode("utf-8"), str(path))
    except (SafetensorError, ConfigError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is not a safetensors file: {error}; restore it") from error
    return tensors, header.get("__metadata__", {})


def _calibrations(measured: Any) -> dict[Level, Calibration]:
    if not isinstance(measured, dict):
        return {}
    read = {level: Calibration.from_dict(measured.get(level)) for level in LEVELS}
    return {level: calibration for level, calibration in read.items() if calibration is not None}


def _described_sha256(described: dict[str, Any]) -> str:
    text = json.dumps(described, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
