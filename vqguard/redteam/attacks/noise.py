"""Random noise at the edge of the budget: what an attack must beat to be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import Trial


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack):
    """`steps` draws of random signs, each eps away from the clean picture; nothing is optimised.

    With one step it is a control; with more the draw of lowest loss is kept.
    """

    name: ClassVar[str] = "noise"
    label: ClassVar[str] = "Random noise"
    sentence: ClassVar[str] = "Random signs at the edge of the budget, without any search."
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.CORRUPTION

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        trial.best_loss.fill_(float("inf"))
        for _ in range(self.steps):
            if trial.finished:
                return
            signs = [torch.randint(0, 2, start.shape[1:], generator=g) for g in trial.generators]
            noise = (2.0 * torch.stack(signs) - 1.0).to(start) * self.eps_255 / 255.0
            trial.evaluate(trial.project(trial.clean + noise))
        trial.judge()
