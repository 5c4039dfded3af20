"""Adam on the pixels: the attack of those who have no budget to keep.

Kingma & Ba 2015 (arXiv 1412.6980). Steps follow the size of the gradient, not its sign alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.attacks.pgd import step_scale
from vqguard.redteam.trial import Descent, Trial


@dataclass(frozen=True, kw_only=True)
class Adam(Attack):
    """Adam's steps, clipped to the budget, falling as a cosine."""

    name: ClassVar[str] = "adam"
    label: ClassVar[str] = "Adam"
    sentence: ClassVar[str] = (
        "Adam on the pixels of each picture by itself, towards the opening of one request's answer."
    )
    measured: ClassVar[bool] = False

    step_255: float = 8.0
    """Learning rate in 1/255."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and the second moment."""

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws its starts alone."""
        return self.starts_at_random

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        wrong = not 0.0 < self.step_255 <= 255.0
        return [f"step_255 must be in (0, 255], got {self.step_255}"] * wrong

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        self.descend(trial, start)

    def descend(self, trial: Descent, start: Tensor) -> None:
        """All steps from `start` (B, 3, H, W), whatever the objective is."""
        first, second = torch.zeros_like(start), torch.zeros_like(start)
        pixels = start
        for number in range(self.steps):
            gradient = trial.gradient(pixels)
            if trial.finished:
                break
            # its scale plays no part in Adam, and a tiny one would be lost in the squares
            size = gradient.abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
            gradient = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
            one, two = self.betas
            first = one * first + (1.0 - one) * gradient
            second = two * second + (1.0 - two) * gradient.square()
            step = (first / (1.0 - one ** (number + 1))) / (
                (second / (1.0 - two ** (number + 1))).sqrt() + 1e-8
            )
            length = self.step_255 / 255.0 * step_scale("cosine", number, self.steps)
            pixels = trial.project(pixels - length * step)
        trial.close(pixels)
