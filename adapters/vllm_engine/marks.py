"""How a picture's verdict gets from where it is made to where its request is let in.

The prompt has a run of placeholders for each picture, whose ids nobody reads: embeddings stand in
their place. The first of them say what is to be done about the picture. They are cached with
the picture, so a picture that comes again has its mark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

WIDTH = 4
"""Placeholders that a mark takes."""


class Marks:
    """Runs of token ids, one for each thing that can be done about a picture."""

    def __init__(self, secret: bytes, vocabulary: int, actions: int) -> None:
        """`vocabulary`: ids that have an embedding; `actions`: how many things can be done."""
        self._ids = [_ids(secret, action, vocabulary) for action in range(actions)]
        if len(set(self._ids)) < actions:
            raise ValueError(f"{vocabulary} token ids are too few for {actions} marks")
        self._actions = {ids: action for action, ids in enumerate(self._ids)}

    def write(self, action: int) -> tuple[int, ...]:
        """The ids of an action's mark."""
        return self._ids[action]

    def read(self, ids: Sequence[int]) -> int | None:
        """The action whose mark these placeholders begin with; None: it is nobody's."""
        return self._actions.get(tuple(ids[:WIDTH]))


def _ids(secret: bytes, action: int, vocabulary: int) -> tuple[int, ...]:
    digest = hashlib.sha256(secret + action.to_bytes(4, "little")).digest()
    return tuple(
        int.from_bytes(digest[4 * i : 4 * i + 4], "little") % vocabulary for i in range(WIDTH)
    )
