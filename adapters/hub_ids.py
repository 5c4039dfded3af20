"""Ids on the model hub are written `hub:owner/name`.

A bare `owner/name` is a path. Were it taken for an id where no such folder is, whoever owns the
account would supply the model, and its guard, for a mistyped or not yet written `runs/model`.
"""

from __future__ import annotations

import os
import re

from vqguard.errors import InputError

HUB = "hub:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_id(name: str | os.PathLike[str]) -> str | None:
    """`owner/name` out of `hub:owner/name`; None for anything else, a path among it.

    Raises:
        InputError: `hub:` is followed by no id.
    """
    if not isinstance(name, str) or not name.startswith(HUB):
        return None
    hub_id = name.removeprefix(HUB)
    if not is_hub_id(hub_id):
        raise InputError(f"expected {HUB}owner/name, got {name!r}")
    return hub_id


def not_a_folder(name: str) -> str:
    """`name`, an id on the hub, where loaders cannot take it for a folder.

    transformers opens a folder of that name, here in the working directory, before it asks the hub.

    Raises:
        InputError: there is one.
    """
    if os.path.lexists(name):
        raise InputError(
            f"the id {name!r} was meant, on the model hub, but a file or folder of that name is "
            f"here and would be opened in its place: run this elsewhere, or write {'./' + name!r} "
            "if the folder is what you mean"
        )
    return name


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name`."""
    return _ID.fullmatch(text) is not None and ".." not in text


def is_commit(text: str | None) -> bool:
    """Whether a text is a full commit's hash, which nobody can move."""
    return text is not None and _COMMIT.fullmatch(text) is not None


def hint(name: str | os.PathLike[str]) -> str:
    """What to write, should a path that is not there have been meant as an id; else nothing."""
    if isinstance(name, str) and is_hub_id(name):
        return f". For the model hub write {HUB + name!r}"
    return ""
