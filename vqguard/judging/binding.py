"""That a safety map is read with the codebooks that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vqguard.errors import ChecksumError
from vqguard.judging.settings import Unfamiliar


def require_bound(
    made_for: str, far: Unfamiliar | None, level: str, checksum: Callable[[Any], str]
) -> None:
    """Raise ChecksumError unless a guard's codebooks are those of a map.

    Args:
        made_for: the map's `codebook_checksum`.
        far: its `judging.unfamiliar`, which may name another codebook.
        level: the level of the guard that judges.
        checksum: gives that of each of its levels.
    """
    own = checksum(level)
    if not made_for:
        raise ChecksumError(
            "the safety map does not name its codebook; calibrate with"
            f" codebook_checksum=guard.checksum({level!r})"
        )
    if made_for != own:
        whose = ""
        if level == "regional" and made_for == checksum("semantic"):
            whose = " (that of the global judge, and this guard judges regions)"
        raise ChecksumError(
            f"the safety map was made for {level} codebook {made_for[:12]}{whose}, this guard"
            f" has {own[:12]}; calibrate again, or set guard.safety_map = None to judge nothing"
        )
    if far is None or far.by == "judged":
        return
    patch = checksum("patch")
    if far.codebook_checksum != patch:
        raise ChecksumError(
            "the safety map calls images unfamiliar by the patch codebook"
            f" {far.codebook_checksum[:12]}, this guard has {patch[:12]}; calibrate again, or set"
            " guard.safety_map = None to judge nothing"
        )
