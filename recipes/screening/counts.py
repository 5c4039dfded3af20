"""The words of verdicts, and how often each was said."""

from __future__ import annotations

from dataclasses import dataclass

OK, REPORTED, FLAGGED, AMBIGUOUS = "ok", "reported", "flagged", "ambiguous"
UNREADABLE, UNKNOWN = "unreadable", "unknown"
"""Of files without a verdict: a picture that could not be read, and what is no picture."""


@dataclass
class Counts:
    """Files by what came of them."""

    judged: int = 0
    flagged: int = 0
    """Ambiguous ones among them."""
    ambiguous: int = 0
    bad: int = 0
    """Pictures that could not be read."""
    unknown: int = 0
    """Files that are no pictures."""
