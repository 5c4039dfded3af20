"""No attacker at all: noise, blur, JPEG, resizing and cropping, the baseline of every attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.corrupted import blurred, cropped, jpeg, resized
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Corruptions(Attack):
    """One corruption a step, from mild to strong, kept inside the budget like any attack."""

    name: ClassVar[str] = "corruptions"
    label: ClassVar[str] = "Corruptions (no attacker)"
    sentence: ClassVar[str] = (
        "Noise, blur, JPEG, resizing and cropping of growing strength: what breaks without anybody "
        "attacking."
    )
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.CORRUPTION

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        rounds = max(1, self.steps // 5)
        for number in range(rounds):
            strength = (number + 1) / rounds
            noise = torch.stack(
                [torch.randn(start.shape[1:], generator=g) for g in trial.generators]
            ).to(start)
            for changed in (
                start + noise * 0.25 * strength,
                blurred(start, 0.5 + 3.0 * strength),
                jpeg(start, max(5, round(90 * (1.0 - strength)))),
                resized(start, 1.0 - 0.75 * strength),
                cropped(start, 1.0 - 0.4 * strength),
            ):
                if trial.finished:
                    return
                trial.evaluate(trial.project(changed.clamp(0.0, 1.0)))
        trial.judge()
