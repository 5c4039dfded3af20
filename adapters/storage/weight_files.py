"""The tensors that a folder's safetensors files hold: found, read one at a time, and hashed.

Checksums are taken from files, not from models: loading in another dtype, on another device or
from other shards does not change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqguard.bounded import open_regular
from vqguard.errors import ArtefactError
from vqguard.files import tensor_bytes
from vqguard.text_files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CLOSED_WEIGHTS = "guarded.safetensors"
# Not in the folder itself: accelerate takes any index that it finds there.
CLOSED_INDEX = "guard/weights.safetensors.index.json"
Place = tuple[Path, str]


def tensor_places(folder: Path) -> dict[str, Place]:
    """Where each tensor is that any `*.safetensors` of `folder` holds, by its name.

    Raises:
        ArtefactError: for damaged files, a name that occurs twice, or no weights at all.
    """
    return _places(folder, sorted(folder.glob("*.safetensors")))


def model_places(folder: Path) -> dict[str, Place]:
    """The same for the files that would be loaded, where a folder holds others as well.

    These are the index's, else the one file's (a guarded model's before others), else all. Raises
    `ArtefactError`.
    """
    for name in (CLOSED_INDEX, CLOSED_WEIGHTS, INDEX, WEIGHTS):
        if (folder / name).is_file():
            files = indexed_files(folder, name) if name.endswith(".json") else [name]
            return _places(folder, [folder / file for file in files])
    return tensor_places(folder)


def close_weights(folder: Path) -> None:
    """Give the weight files that transformers wrote into `folder` the names of a guarded model's.

    Raises OSError.
    """
    stem, closed = Path(WEIGHTS).stem, Path(CLOSED_WEIGHTS).stem
    for path in folder.glob("*.safetensors"):
        path.rename(folder / path.name.replace(stem, closed, 1))
    index = folder / INDEX
    if index.is_file():
        content = read_json(index, ArtefactError)
        places = content["weight_map"]
        content["weight_map"] = {k: v.replace(stem, closed, 1) for k, v in places.items()}
        (folder / CLOSED_INDEX).parent.mkdir(exist_ok=True)
        (folder / CLOSED_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        index.unlink()


def closed_entry(folder: Path) -> str:
    """The file from which a guarded model's weights are loaded: its index, or the one file."""
    return CLOSED_INDEX if (folder / CLOSED_INDEX).is_file() else CLOSED_WEIGHTS


def indexed_files(folder: Path, name: str = INDEX) -> list[str]:
    """The shards that an index names, sorted.

    Raises:
        ArtefactError: for one outside `folder`.
    """
    index = folder / name
    try:
        files = set(read_json(index, ArtefactError)["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{index} is damaged ({error!r}); restore it") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ArtefactError(f"{index} points outside of {folder}: {file!r}; restore it")
    return sorted(files)


def read_tensor(place: Place) -> Tensor:
    """One tensor on the CPU. Raises `ArtefactError`."""
    path, key = place
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); restore it") from error


def tensors_sha256(named: Mapping[str, Place]) -> str:
    """SHA-256 over these tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, place in sorted(named.items()):
        tensor = read_tensor(place).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor_bytes(tensor)))
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str:
    """The checksum of the weights that would be loaded from `folder`.

    It stays the same when the files are sharded otherwise, and changes with any name, dtype or
    value. Raises `ArtefactError`.
    """
    return tensors_sha256(model_places(folder))


def projector_sha256(folder: Path, paths: tuple[str, ...]) -> str:
    """SHA-256 over the projector's tensors as the files hold them: name, dtype, shape, bytes.

    It is what schema 1 bound.

    `paths`: where an adapter says that they may lie (`Adapter.projector_keys`).

    Raises:
        ArtefactError: when no file holds weights.
    """
    places = tensor_places(folder)
    projector = {
        tail: place for key, place in places.items() if (tail := _projector_key(key, paths))
    }
    # Some families are saved under other names than they have: then every tensor counts.
    return tensors_sha256(projector or places)


def _projector_key(key: str, paths: tuple[str, ...]) -> str:
    """What follows the projector's path in a key; with several projectors the whole key."""
    for path in paths:
        head, mark, tail = key.partition(path + ".")
        if mark and (not head or head.endswith(".")):
            return tail if len(paths) == 1 else key
    return ""


def _places(folder: Path, files: Iterable[Path]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for path in files:
        try:
            open_regular(path).close()  # a pipe would be waited for
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtefactError(f"{path} is damaged ({error}); restore it") from error
        for name in names:
            if name in places:
                raise ArtefactError(f"{name} is in {path} and in {places[name][0]}")
            places[name] = (path, name)
    if not places:
        raise ArtefactError(f"no *.safetensors in {folder} holds any weights; restore them")
    return places
