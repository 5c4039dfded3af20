"""The verdict of a majority, as that of one copy: the one in the middle by its score.

Of an odd number of copies the median is above a threshold exactly where most of them are. So the
majority's verdict has a score, a code and a region like any other. After the median smoothing of
Chiang et al. 2020 (arXiv 2007.03730).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vqguard.codebooks.guard_output import PADDING, Judged
from vqguard.errors import InputError
from vqguard.judging.verdict import Verdict


class Judges(Protocol):
    """What is asked of a safety map."""

    def judge(
        self,
        codes: Tensor,
        mask: Tensor | None = None,
        distances: Tensor | None = None,
        visual: Tensor | None = None,
    ) -> list[Verdict]:
        """One verdict an image."""


def middle_copy(safety_map: Judges, copies: Sequence[Judged]) -> Judged:
    """Of each of B images the copy whose (flagged, score) is the median; the first of several.

    `copies`: an odd number, each of the same B images in the same layout. Whether an image is
    unfamiliar by its visual tokens has a median of its own, by their distances: that of no copy
    depends on scores.

    Raises:
        InputError: an even number of copies, or copies of other images.
    """
    if len(copies) % 2 == 0:
        raise InputError(f"expected an odd number of copies, got {len(copies)}")
    if len({tuple(copy.codes.shape) for copy in copies}) > 1:
        raise InputError(f"copies of other images: {[tuple(copy.codes.shape) for copy in copies]}")
    if len(copies) == 1:
        return copies[0]
    far = [copy.visual for copy in copies if copy.visual is not None]
    visual = torch.stack(far).median(dim=0).values if len(far) == len(copies) else None
    copies = [copy._replace(visual=visual) for copy in copies]
    ranks = torch.stack([_rank(safety_map, copy) for copy in copies])
    middle = ranks.argsort(dim=0, stable=True)[len(copies) // 2]
    rows = torch.arange(len(middle))

    def chosen(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts))[middle.to(parts[0].device), rows.to(parts[0].device)]

    codes = chosen([copy.codes for copy in copies])
    distances = [copy.distances for copy in copies if copy.distances is not None]
    return Judged(
        codes,
        None if copies[0].mask is None else codes != PADDING,
        chosen(distances) if len(distances) == len(copies) else None,
        visual,
    )


def _rank(safety_map: Judges, copy: Judged) -> Tensor:
    """(B,) float64 on the CPU: the score, plus 2 where the copy is flagged for whatever reason."""
    verdicts = safety_map.judge(*copy)
    scores = torch.tensor([max(verdict.scores) for verdict in verdicts], dtype=torch.float64)
    flagged = torch.tensor([verdict.flagged for verdict in verdicts])
    return scores.clamp(0.0, 1.0) + 2.0 * flagged
