"""Answer and verdict together, the weight between them found on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.quantised import answer_and_verdict, quantised
from vqguard.redteam.trial import Steered, Trial


@dataclass(frozen=True, kw_only=True)
class Joint(PGD):
    """PGD on answer + weight * verdict, each image with a weight of its own.

    The weight grows while the verdict is in the way and falls while it is not: a fixed one drowns
    the answer, or lets the picture be flagged.
    """

    name: ClassVar[str] = "joint"
    label: ClassVar[str] = "Joint: answer and verdict"
    sentence: ClassVar[str] = (
        "PGD on the answer and the verdict together, with a weight between them that follows what "
        "stands in the way."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True

    weight: float = 1.0
    """First weight of the verdict's term, 0 to about 1 a token, against nats."""
    up: float = 1.5
    """What it is multiplied by where the verdict is in the way."""
    down: float = 0.9
    """What it is multiplied by where it is not."""

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = quantised(trial.target, self.name)
        weights = dict.fromkeys(trial.request.tolist(), self.weight)

        def objective(pixels: Tensor, request: Tensor) -> Tensor:
            numbers = request.tolist()
            answer, verdict = answer_and_verdict(target, pixels, request)
            now = torch.tensor([weights[number] for number in numbers]).to(verdict)
            for number, term in zip(numbers, verdict.tolist(), strict=True):
                factor = self.up if term > 0.0 else self.down
                weights[number] = min(100.0, max(0.05, weights[number] * factor))
            return answer + now * verdict

        self.descend(Steered(trial, objective), start)
