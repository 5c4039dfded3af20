"""RayS: a search that sees nothing but decisions.

Chen & Gu 2020 (arXiv 2006.12792): the direction of a ray is a vector of signs; blocks of it are
turned round, halved from stage to stage, and kept where the boundary of the decision comes nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import Trial, judged

_TOLERANCE = 1e-3  # of the distance to the boundary, in pixels of [0, 1]


@dataclass
class _Ray:
    """The search of one image."""

    signs: Tensor
    """(n,) of -1 and 1."""
    reach: float
    """Nearest known distance at which the decision is the wanted one; infinite: not known."""
    stage: int = 0
    block: int = 0
    turned: Tensor | None = None
    """Signs whose boundary is being looked for, between `low` and `high`."""
    low: float = 0.0
    high: float = 0.0

    @property
    def nearest(self) -> tuple[Tensor, float]:
        """Direction and distance of the nearest point that is known to succeed; 1 at most."""
        if self.turned is not None:
            return self.turned, self.high
        return self.signs, min(self.reach, 1.0)

    def query(self) -> tuple[Tensor, float]:
        """The next direction and distance to ask about."""
        if self.turned is not None:
            return self.turned, (self.low + self.high) / 2.0
        return self._turn(), min(self.reach, 1.0)

    def answer(self, wanted: bool) -> None:
        """What came of the query."""
        signs, distance = self.query()
        if self.turned is None:
            if wanted:
                self.turned, self.low, self.high = signs, 0.0, distance
            self._advance()
        elif wanted:
            self.high = distance
        else:
            self.low = distance
        if self.turned is not None and self.high - self.low < _TOLERANCE:
            self.signs, self.reach, self.turned = self.turned, self.high, None

    def _turn(self) -> Tensor:
        if self.reach == float("inf") and self.stage == 0:
            return self.signs  # the first ray is asked about as it is
        length = -(-len(self.signs) // 2**self.stage)
        signs = self.signs.clone()
        signs[self.block * length : (self.block + 1) * length] *= -1.0
        return signs

    def _advance(self) -> None:
        self.block += 1
        length = -(-len(self.signs) // 2**self.stage)
        if self.block * length >= len(self.signs):
            self.block = 0
            self.stage = self.stage + 1 if length > 1 else 0


@dataclass(frozen=True, kw_only=True)
class RayS(Attack):
    """`steps` are queries: each sees whether the victim's decision is the wanted one, no more.

    Queries may lie outside of the ball; what is kept lies in it.
    """

    name: ClassVar[str] = "rays"
    label: ClassVar[str] = "RayS (decisions only)"
    sentence: ClassVar[str] = (
        "A search along rays of signs that sees whether it succeeds and nothing else."
    )
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.DECISIONS

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        rays = [_Ray(torch.ones(start[0].numel()), float("inf")) for _ in range(len(start))]
        for _ in range(self.steps):
            if trial.finished:
                return
            rows = trial.active
            asked = [rays[row].query() for row in rows.tolist()]
            moves = torch.stack([signs * distance for signs, distance in asked]).to(start)
            tried = (trial.clean[rows] + moves.view(-1, *start.shape[1:])).clamp(0.0, 1.0)
            wanted = judged(trial.target, tried, trial.request[rows])
            inside, loss = start.clone(), torch.ones_like(trial.best_loss)
            for place, row in enumerate(rows.tolist()):
                rays[row].answer(bool(wanted[place]))
                signs, distance = rays[row].nearest
                inside[row] = trial.clean[row] + signs.view(start.shape[1:]).to(start) * distance
                loss[row] = distance
            trial.observe(trial.project(inside), loss)
        trial.judge()
