"""The base model that a guard without its base belongs to: where its weights are, and which."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from vqguard.adapters.catalogue import list_models, resolve_model
from vqguard.adapters.hub_ids import is_commit, is_hub_id
from vqguard.adapters.storage.manifest import RecordedBase
from vqguard.adapters.storage.weight_files import weights_sha256
from vqguard.errors import ArtefactError, ChecksumError

SHIPPED = "weights"  # the folder of a package that ships a model
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]


@dataclass(frozen=True)
class BaseModel:
    """A folder of safetensors weights and how others can find the same one."""

    folder: Path
    """Where the files are on this machine."""
    source: str
    """Its kind: "hub", "package", or "path" for a local folder."""
    name: str
    """The hub id, the model's name in the registry, or the local folder's own name."""
    revision: str | None = None
    """The hub's commit, None elsewhere."""

    def describe(self) -> RecordedBase:
        """What the manifest says of it. Reads all weights once. Raises `ArtefactError`."""
        checksum = weights_sha256(self.folder)
        return RecordedBase(self.source, self.name, self.revision, checksum)


def find_base(name: str | os.PathLike[str], revision: str | None = None) -> BaseModel:
    """The base that a registered name, `hub:owner/name` (downloaded if need be) or a folder means.

    Raises:
        InputError: for an unknown name.
    """
    entry = resolve_model(name)
    if entry.source == "path":
        folder = Path(entry.location)
        return BaseModel(folder, "path", folder.resolve().name)
    if entry.source == "package":
        files = importlib.resources.files(entry.location) / SHIPPED
        return BaseModel(Path(str(files)), "package", entry.name)
    return _downloaded(entry.location, revision)


def _downloaded(name: str, revision: str | None) -> BaseModel:
    folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    return BaseModel(folder, "hub", name, folder.name)


def recorded_base(described: RecordedBase, given: str | os.PathLike[str] | None) -> BaseModel:
    """The base that a manifest describes, or `given` in its place; either must be the same one.

    A manifest is as trusted as the folder that it lies in. What it names is therefore taken in the
    sense that it was written in alone: a model that ships with a package, or one commit of a hub
    id, whose weights must have the recorded checksum. It never becomes a local path.

    Raises:
        ArtefactError: when it cannot be found from the manifest alone.
        ChecksumError: when its weights are not those the guard was made for.
    """
    base = _described(described) if given is None else find_base(given)
    checksum = weights_sha256(base.folder)
    if checksum != described.weights_sha256:
        raise ChecksumError(
            f"the weights in {base.folder} are not the base this guard was made for "
            f"({described.name!r}, SHA-256 {described.weights_sha256}): theirs is {checksum}. "
            "Codes and verdicts would mean nothing. Name the right base with base=, "
            "or --base of a command"
        )
    return base


def _described(described: RecordedBase) -> BaseModel:
    source, name, revision = described.source, described.name, described.revision
    if source == "path":
        raise ArtefactError(
            f"this guard was made for a local model, {name!r}, and holds no base: "
            "name its folder with load_guarded(path, base=FOLDER), or --base FOLDER of a command"
        )
    if source == "hub" and is_hub_id(name) and is_commit(revision):
        return _downloaded(name, revision)
    if source == "package" and name in {m.name for m in list_models() if m.source == "package"}:
        return find_base(name)
    raise ArtefactError(
        f"the base that this guard names, {name!r} from {source!r} at revision {revision!r}, is "
        "neither a model of this package nor one commit of a hub id: name its folder with "
        "load_guarded(path, base=FOLDER), or --base FOLDER of a command"
    )
