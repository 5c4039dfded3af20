"""PGD with sign steps and momentum.

Madry et al. 2018 (arXiv 1706.06083) for the projected sign step; Dong et al. 2018 (MI-FGSM,
arXiv 1710.06081, eq. 6) for the momentum on the L1-normalised gradient.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.facts import Budget
from vqguard.redteam.trial import Descent, Trial

Decay = Literal["constant", "linear", "cosine"]


def step_scale(decay: Decay, step: int, steps: int) -> float:
    """What the step size is multiplied by at `step` of `steps`: 1 at the first, falling to 0."""
    if decay == "linear":
        return 1.0 - step / steps
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return 1.0


def step_size(eps_255: float) -> float:
    """A report's step in 1/255: an eighth of the budget, at least 1 and at most 4."""
    return float(min(4.0, max(1.0, eps_255 / 8)))


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent on the target's loss.

    g <- momentum * g + gradient / ||gradient||_1 (mean over the image instead of the sum, which
    changes no sign), x <- project(x - step * sign(g)).
    """

    name: ClassVar[str] = "per_request"
    label: ClassVar[str] = "Per request"
    sentence: ClassVar[str] = (
        "PGD with momentum on each picture by itself, towards the opening of one request's answer."
    )

    step_255: float = 1.0
    """Step size in 1/255."""
    momentum: float = 0.9
    """Decay of the accumulated gradient; 1 in the MI-FGSM paper, 0 is plain PGD."""
    decay: Decay = "constant"
    """How the step size falls over the steps."""

    @classmethod
    def within(cls, budget: Budget) -> PGD:
        """See `MeasuredAttack.within`: a step by `step_size`, falling as a cosine."""
        return cls(
            **asdict(budget), step_255=step_size(budget.eps_255), momentum=0.9, decay="cosine"
        )

    @classmethod
    def caption(cls, circumstances: str) -> str:
        """See `MeasuredAttack.caption`: a picture without an attack's name is this one's."""
        return circumstances

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws its starts alone."""
        return self.starts_at_random

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        problems = []
        if not (0.0 < self.step_255 <= 255.0):
            problems.append(f"step_255 must be in (0, 255] (units of 1/255), got {self.step_255}")
        if not 0.0 <= self.momentum <= 1.0:
            problems.append(f"momentum must be in [0, 1], got {self.momentum}")
        if self.decay not in get_args(Decay):
            problems.append(f"decay must be one of {get_args(Decay)}, got {self.decay!r}")
        return problems

    def step(self, pixels: Tensor, velocity: Tensor, gradient: Tensor, number: int) -> Tensor:
        """One sign step, not yet projected; `velocity` (like pixels) is updated in place."""
        size = gradient.abs().flatten(1).mean(dim=1).view(-1, 1, 1, 1)
        # a zero gradient stays zero; the smallest normal number keeps 0 / 0 away
        scaled = gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
        velocity.mul_(self.momentum).add_(scaled)
        length = self.step_255 / 255.0 * step_scale(self.decay, number, self.steps)
        return pixels - length * velocity.sign()

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        self.descend(trial, start)

    def descend(self, trial: Descent, start: Tensor) -> None:
        """All steps from `start` (B, 3, H, W), whatever the loss is a mean of."""
        pixels, velocity = start, torch.zeros_like(start)
        for number in range(self.steps):
            gradient = trial.gradient(pixels)
            if trial.finished:
                break
            pixels = trial.project(self.step(pixels, velocity, gradient, number))
        trial.close(pixels)
