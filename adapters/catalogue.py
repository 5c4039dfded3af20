"""Public names of models, and where each leads.

Names are listed without torch or transformers: that must be instant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from vqguard.adapters.families.names import checkpoints
from vqguard.adapters.families.registration import family_table
from vqguard.adapters.hub_ids import hint, hub_id, not_a_folder
from vqguard.errors import InputError
from vqguard.files import expanded
from vqguard.names import nearest_names

Status = Literal["measured", "architecture"]
Source = Literal["hub", "package", "path"]


@dataclass(frozen=True)
class ModelEntry:
    """Where a name leads.

    `status` is `measured` when the project's own reports use these weights, `architecture` when
    only the architecture is tested, with random weights. `source` says what `location` is: the id
    of a public checkpoint, an importable package of this project that ships the weights, or a
    local folder (whose `status` is `architecture`).
    """

    name: str
    model_type: str
    source: Source
    location: str
    status: Status
    note: str = ""


@cache
def _own() -> tuple[ModelEntry, ...]:
    tiny = ModelEntry(
        "llava-tiny", "llava", "package", "vqguard.recipes.tiny", "measured", "the embedded world"
    )
    listed = (
        ModelEntry(name, model_type, "hub", place, "architecture")
        for name, model_type, place in checkpoints()
    )
    return (tiny, *listed)


def list_models() -> tuple[ModelEntry, ...]:
    """Every name the project knows, in the order of the list of families.

    Then the names that other packages' adapters brought when they were imported.
    """
    entries = {entry.name: entry for entry in _own()}
    for family in family_table().values():
        for name, place in family.checkpoints.items():
            if name not in entries:
                entries[name] = ModelEntry(name, family.model_type, "hub", place, "architecture")
    return tuple(entries.values())


def resolve_model(name: str | os.PathLike[str]) -> ModelEntry:
    """Where `name` leads: an alias, a listed checkpoint's id, `hub:owner/name`, or a local folder.

    A folder wins over an alias only when it is written as a path (with a separator or a leading
    dot) or when no alias has that name; a `Path` is a folder always. An id that is not listed needs
    `hub:` in front: it is passed on with an empty `model_type`, and the adapter is chosen when the
    model is loaded.

    Raises:
        InputError: for an unknown name, with the nearest known ones; and for an id where a folder
            of that name is here, which transformers would open in its place.
    """
    if not isinstance(name, str):
        if not Path(name).is_dir():
            raise _no_folder(name)
        return _folder(name)
    entries = list_models()
    by_name = {entry.name: entry for entry in entries}
    if name in by_name:
        return _certain(by_name[name])
    wanted = hub_id(name)
    if wanted is None and name and (folder := expanded(Path(name))).is_dir():
        return _folder(name if Path(name).is_dir() else folder)
    for entry in entries:
        if entry.source == "hub" and entry.location == (wanted or name):
            return _certain(entry)
    if wanted is not None:
        return _certain(ModelEntry(name, "", "hub", wanted, "architecture"))
    if _looks_like_path(name):
        raise _no_folder(name)
    close = nearest_names(name, by_name, most=3)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise InputError(
        f"unknown model {name!r}: {guess}expected a folder, a hub id as 'hub:owner/name' or one of "
        f"{', '.join(by_name)}"
    )


def _folder(name: str | os.PathLike[str]) -> ModelEntry:
    # An absolute path has not the form of an id: no loader asks the hub for it, whatever happens
    # to the folder.
    return ModelEntry(os.fspath(name), "", "path", str(Path(name).absolute()), "architecture")


def _certain(entry: ModelEntry) -> ModelEntry:
    """The entry; an id on the hub only where no folder would be opened in its place."""
    if entry.source == "hub":
        not_a_folder(entry.location)
    return entry


def _no_folder(name: str | os.PathLike[str]) -> InputError:
    return InputError(
        f"no folder at {os.fspath(name)!r}: expected a folder written by save_pretrained; check "
        f"the path{hint(name)}"
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or "/" in name or not name
