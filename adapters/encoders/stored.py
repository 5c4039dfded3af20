"""A guard behind a vision encoder on disk: the guard, and which encoder it belongs to.

    encoder.json   the encoder's name, the checksum of its weights and that of the guard
    guard/         codebooks and safety map

The encoder's weights stay where its library keeps them. As with a guard without its base, what the
file names never becomes a local path: an encoder that came from one is named again by the caller.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from vqguard.adapters.encoders.guard_encoder import guard_encoder
from vqguard.encoder import GuardedEncoder
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import checksums, file_sha256, replace_text, text_sha256
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap
from vqguard.strict import StrictData
from vqguard.text_files import read_json

ENCODER, GUARD = "encoder.json", "guard"
_NAMED = re.compile(r"(timm|open_clip):[\w.-]+|transformers:hub:[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class EncoderManifest(StrictData):
    """`encoder.json`."""

    schema: Literal[1]
    encoder: str
    """As `guard_encoder` takes it; of one by a path the library alone, as in "transformers:"."""
    weights: str | None
    """A tag of the library; None: its own weights."""
    local: bool
    """Whether the folder or the file of weights is the caller's to name."""
    weights_sha256: str
    """Over all tensors of the encoder."""
    guard_sha256: str
    """Of `guard.json`, which names the checksum of the weights beside it."""


def holds_encoder(folder: Path) -> bool:
    """Whether a folder holds a guard behind a vision encoder."""
    return (folder / ENCODER).is_file()


def local_part(encoder: str, weights: str | None) -> str | None:
    """What of an encoder's name lies on this machine alone: what `load_encoder` takes as `base`."""
    if not _is_named(encoder):
        return encoder
    return weights if weights is not None and Path(weights).is_file() else None


def save_encoder(
    folder: Path, guarded: GuardedEncoder, encoder: str, weights: str | None = None
) -> None:
    """Write a guard and the name of its encoder into `folder`.

    Args:
        folder: made if missing.
        guarded: as `guard_encoder(encoder, pretrained=weights)` made it.
        encoder, weights: as given there.
    """
    local = local_part(encoder, weights) is not None
    if not _is_named(encoder):
        encoder = f"{encoder.partition(':')[0]}:"
    guarded.guard.save_pretrained(folder / GUARD)
    named = None if local else weights
    _write(folder, EncoderManifest(1, encoder, named, local, _weights_sha256(guarded), ""))


def replace_encoder_map(folder: Path, safety_map: SafetyMap) -> None:
    """Give the guard behind an encoder another safety map.

    Raises:
        ArtefactError: a damaged folder.
        ConfigError: the map was made for other codewords.
    """
    manifest = read_encoder_manifest(folder)
    guard = VQGuard.from_pretrained(folder / GUARD)
    guard.safety_map = safety_map
    guard.save_pretrained(folder / GUARD)
    _write(folder, manifest)


def load_encoder(folder: Path, base: str | None = None) -> GuardedEncoder:
    """The guarded encoder of a folder, in eval mode.

    Args:
        folder: as `save_encoder` wrote it.
        base: of an encoder that came from a local folder or file, its name (`transformers:FOLDER`)
            or the file of its weights.

    Raises:
        ArtefactError: a folder that is not whole, and an encoder that cannot be had.
        ChecksumError: another encoder, or another guard, than was saved.
        ConfigError: a `base` where the library has the weights.
    """
    manifest = read_encoder_manifest(folder)
    family, _, rest = manifest.encoder.partition(":")
    name, weights = manifest.encoder, manifest.weights
    what = "file of weights" if rest else "folder"
    if rest and not _is_named(name):
        raise ArtefactError(f"{folder / ENCODER}: {name!r} names no encoder; save the guard again")
    if manifest.local and base is None:
        raise ArtefactError(
            f"{folder}: its encoder came from a {what} of yours, and the guard holds none: name it "
            "with --base of a command, or base= in Python"
        )
    if base is not None and not manifest.local:
        raise ConfigError(f"{folder} names its encoder, {name}: leave base out")
    if base is not None and rest:
        weights = base
    elif base is not None:
        name = f"{family}:{base.removeprefix(f'{family}:')}"
    path = folder / GUARD / "guard.json"
    if not path.is_file() or file_sha256(path) != manifest.guard_sha256:
        raise ChecksumError(f"{path} is not the guard that was saved with {ENCODER}; restore it")
    guard = VQGuard.from_pretrained(folder / GUARD)
    guarded = guard_encoder(name, pretrained=weights, guard=guard)
    if _weights_sha256(guarded) != manifest.weights_sha256:
        raise ChecksumError(
            f"{name} has other weights than the guard in {folder} was calibrated with: codes and "
            "verdicts would mean nothing. Name the right ones"
        )
    return guarded


def _write(folder: Path, manifest: EncoderManifest) -> None:
    """Write `encoder.json`, which binds the guard beside it."""
    bound = replace(manifest, guard_sha256=file_sha256(folder / GUARD / "guard.json"))
    replace_text(folder / ENCODER, json.dumps(bound.to_dict(), indent=2) + "\n")


def read_encoder_manifest(folder: Path) -> EncoderManifest:
    """`encoder.json` of a folder.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    try:
        return EncoderManifest.from_dict(read_json(folder / ENCODER, ArtefactError))
    except ConfigError as error:
        raise ArtefactError(f"{folder / ENCODER}: {error}") from error


def _is_named(encoder: str) -> bool:
    """Whether a name leads to a library's own model or to an id, and to no file or folder."""
    return _NAMED.fullmatch(encoder) is not None


def _weights_sha256(guarded: GuardedEncoder) -> str:
    encoder = guarded.encoder
    tensors = encoder.state_dict() if isinstance(encoder, nn.Module) else {}
    return text_sha256(json.dumps(checksums(tensors), sort_keys=True))
