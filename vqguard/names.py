"""Names that come from outside: how one is shown, and what a mistyped one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str, *, lines: bool = False) -> str:
    r"""`text` as it may reach a terminal, a log or a list: on one line, without controls.

    What is not printable (controls, escape sequences, line ends, marks that turn the direction of
    writing, other invisible characters, bytes that are no text) becomes the escape that Python
    writes for it, such as `\x1b`. Printable text stays as it is, so that escaping twice changes
    nothing; it is not meant to be reversed.

    Args:
        text: from outside.
        lines: line ends and tabs may stay: the text is expected to have several lines.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


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
