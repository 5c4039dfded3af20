"""Square: a search by the loss alone.

Andriushchenko et al. 2020 (arXiv 1912.00049), the L-infinity version: vertical stripes first, then
squares of one colour at the edge of the ball, kept where the loss falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import Trial

_HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of 10 000 queries (paper, appendix)


def share_of_pixels(start: float, query: int, queries: int) -> float:
    """p: the share of the picture that a square covers, halved as the search goes on."""
    passed = sum(query * 10_000 / queries > limit for limit in _HALVINGS)
    return start / 2.0**passed


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Random search; `steps` are queries of the loss."""

    name: ClassVar[str] = "square"
    label: ClassVar[str] = "Square (loss only)"
    sentence: ClassVar[str] = (
        "A random search with squares at the edge of the budget, which sees the loss of each query "
        "and no gradient."
    )
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.SCORES

    share: float = 0.8
    """First share of the picture that a square covers (paper: 0.8)."""

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        return [f"share must be in (0, 1], got {self.share}"] * (not 0.0 < self.share <= 1.0)

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        eps = self.eps_255 / 255.0
        height, width = start.shape[2:]
        rows = range(len(start))
        pixels = start.clone()
        for row in rows:
            stripes = torch.randint(0, 2, (3, 1, width), generator=trial.generators[row])
            pixels[row] = trial.clean[row] + (2.0 * stripes - 1.0).to(start) * eps
        pixels = trial.project(pixels)
        kept = trial.evaluate(pixels).clone()
        for query in range(1, self.steps):
            if trial.finished:
                return
            area = share_of_pixels(self.share, query, self.steps) * height * width
            side = max(1, min(height, width, round(area**0.5)))
            tried = pixels.clone()
            for row in trial.active.tolist():
                generator = trial.generators[row]
                top = int(torch.randint(0, height - side + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - side + 1, (1,), generator=generator))
                signs = 2.0 * torch.randint(0, 2, (3, 1, 1), generator=generator) - 1.0
                window = (row, slice(None), slice(top, top + side), slice(left, left + side))
                tried[window] = trial.clean[window] + signs.to(start) * eps
            tried = trial.project(tried)
            loss = trial.evaluate(tried)
            better = loss < kept
            pixels = torch.where(better.view(-1, 1, 1, 1), tried, pixels)
            kept = torch.where(better, loss, kept)
        trial.judge()
