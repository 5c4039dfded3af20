"""What another map would have said of pictures that a server judged: from its audit log alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vqguard.errors import ConfigError, DataError
from vqguard.judging.policies import UNFAMILIAR
from vqguard.safety_map import SafetyMap, Verdict
from vqguard.text_files import parse_json

_LONGEST = 2**20  # characters of a line


@dataclass(frozen=True)
class LoggedFlip:
    """A picture about which the map says something else now than it was logged."""

    sha256: str | None
    request: str
    before: tuple[str, str]
    """(category, action), as logged."""
    after: Verdict


@dataclass
class LogDiff:
    """What changes over a log."""

    pictures: int = 0
    flips: list[LoggedFlip] = field(default_factory=list)
    unfamiliar: int = 0
    """Pictures that were unfamiliar: codes do not say how far they were, so they stay so."""
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(category before, category after) of the flips."""


def diff_log(log: Path, safety_map: SafetyMap) -> LogDiff:
    """Judge the codes of an audit log by a map of the same codebook.

    Raises:
        DataError: a line that is none of an audit log's, naming it.
    """
    diff = LogDiff()
    with log.open(encoding="utf-8") as lines:
        for number, text in enumerate(iter(lambda: lines.readline(_LONGEST), ""), start=1):
            if not text.strip():
                continue
            line = _line(text, f"{log}: line {number}", safety_map.cells)
            diff.pictures += 1
            if line["category"] == UNFAMILIAR:
                diff.unfamiliar += 1
                continue
            (verdict,) = safety_map.judge(torch.tensor([line["codes"]]))
            before = (line["category"], line["action"])
            if before != (verdict.category, verdict.action):
                diff.flips.append(LoggedFlip(line["sha256"], line["request"], before, verdict))
                diff.changes[before[0], verdict.category] += 1
    return diff


def _line(text: str, where: str, cells: int) -> dict[str, Any]:
    try:
        line = parse_json(text)
    except ConfigError as error:
        raise DataError(
            f"{where} is not JSON: expected a log of `vqguard serve --audit`"
        ) from error
    codes = line.get("codes") if isinstance(line, dict) else None
    known = isinstance(line, dict) and all(
        isinstance(line.get(name), str) for name in ("category", "action", "request")
    )
    fits = isinstance(codes, list) and all(type(c) is int and 0 <= c < cells for c in codes)
    if not (known and codes and fits):
        raise DataError(
            f"{where}: expected a category, an action, a request and codes below {cells}; a log of "
            "another guard cannot be compared"
        )
    return dict(line)
