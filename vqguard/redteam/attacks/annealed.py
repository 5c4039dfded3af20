"""PGD through a softmax whose temperature falls: soft walls first, hard ones at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.quantised import quantised
from vqguard.redteam.softmax import SoftmaxEstimator
from vqguard.redteam.trial import Steered, Trial


@dataclass(frozen=True, kw_only=True)
class AnnealedSoftmax(PGD):
    """The temperature falls geometrically from `hot` to `cold` over the steps of a restart."""

    name: ClassVar[str] = "annealed_softmax"
    label: ClassVar[str] = "Annealed softmax"
    sentence: ClassVar[str] = (
        "PGD through a softmax over the nearest codewords, whose temperature falls from step to "
        "step."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("softmax",)

    hot: float = 2.0
    """First temperature, in the unit of `SoftmaxEstimator`."""
    cold: float = 0.05
    """Last one."""
    neighbours: int = 32
    """See `SoftmaxEstimator`."""

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        wrong = not 0.0 < self.cold <= self.hot
        told = f"expected 0 < cold <= hot, got {self.cold} and {self.hot}"
        return [*super().problems(), *[told] * wrong]

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = quantised(trial.target, self.name)

        def objective(pixels: Tensor, request: Tensor) -> Tensor:
            share = min(1.0, len(trial.curve) / max(1, self.steps - 1))
            temperature = self.hot * (self.cold / self.hot) ** share
            estimator = SoftmaxEstimator(temperature, self.neighbours)
            return target.loss_through(pixels, request, estimator)

        self.descend(Steered(trial, objective), start)
