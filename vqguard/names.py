"""What a mistyped name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_names(name: str, valid: Iterable[str], most: int = 1) -> list[str]:
    """The valid names closest to `name`, whatever its case, closest first; at most `most`."""
    known = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), known, n=most, cutoff=0.5)
    return [known[match] for match in close]


def nearest_name(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, whatever its case; None if none is close."""
    return next(iter(nearest_names(name, valid)), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the valid name closest to `name`, else the list of names."""
    names = list(valid)
    close = nearest_name(name, names)
    if close is not None:
        return f" Did you mean {close!r}?"
    return f" Valid names: {', '.join(names)}." if names else ""
