"""Checkpoints that survive a kill or a full disk: one counts when its mark says it is whole."""

from __future__ import annotations

import json
from pathlib import Path

COMPLETE = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Write the mark: every file's size, as the last file of a checkpoint."""
    sizes = {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != COMPLETE}
    (checkpoint / COMPLETE).write_text(json.dumps(sizes))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end, or None."""
    found = sorted(
        (p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()),
        key=step_of,
        reverse=True,
    )
    return next((p for p in found if _whole(p)), None)


def _whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
