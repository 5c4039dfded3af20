"""APGD: the step size follows the loss of each image.

Croce & Hein 2020 (arXiv 2003.01690), algorithm 1, on the target's own loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.trial import Trial


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size is looked at: shares 0, 0.22, ... of all steps (eq. 3)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1.0:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # rounded first: 0.41 + 0.16 is a little more than 0.57
    return sorted({min(steps, math.ceil(round(share * steps, 6))) for share in shares})


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Sign steps with a momentum of iterates; the step is halved where progress has stopped.

    z = project(x - eta sign(g)), x' = project(x + alpha (z - x) + (1 - alpha) (x - x_before)).
    At a checkpoint an image whose loss fell in less than `rho` of the steps since the last one, or
    whose step and best loss are those of the last one, halves eta and goes on from its best point.
    Later restarts begin on the surface of the ball, as in the authors' code.
    """

    name: ClassVar[str] = "apgd"
    label: ClassVar[str] = "APGD"
    sentence: ClassVar[str] = (
        "APGD: sign steps on each picture by itself, halved and taken up again from the best point "
        "wherever the loss has stopped to fall."
    )
    measured: ClassVar[bool] = False

    alpha: float = 0.75
    """Share of the new step against the last move (paper: 0.75)."""
    rho: float = 0.75
    """Share of the steps that must succeed for the step size to stay (paper: 0.75)."""

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws its starts alone."""
        return self.starts_at_random

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        return [
            f"{name} must be in [0, 1], got {getattr(self, name)}"
            for name in ("alpha", "rho")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        looks = checkpoints(self.steps)
        shape = (-1, 1, 1, 1)
        eta = trial.best_loss.new_full((len(start),), 2.0 * self.eps_255 / 255.0)
        if trial.restart > 0:
            start = self._on_the_surface(trial)
        pixels, before = start, start
        slope_at_best = torch.zeros_like(start)
        fell = torch.zeros_like(eta)
        last_loss, last_look = trial.best_loss.clone(), 0
        best_at_look, halved = trial.best_loss.clone(), torch.ones_like(trial.won)
        for number in range(self.steps):
            best_before = trial.best_loss.clone()
            gradient = trial.gradient(pixels)
            if trial.finished:
                break
            loss = trial.curve[-1]
            improved = (trial.best_loss < best_before).view(shape)
            slope_at_best = torch.where(improved, gradient, slope_at_best)
            fell += (loss < last_loss).to(fell)
            last_loss = loss
            if number in looks and number > 0:
                since = number - last_look
                stalled = fell < self.rho * since
                stuck = ~halved & (trial.best_loss >= best_at_look)
                halved = stalled | stuck
                eta = torch.where(halved, eta / 2.0, eta)
                back = halved.view(shape)
                pixels = torch.where(back, trial.best, pixels)
                gradient = torch.where(back, slope_at_best, gradient)
                fell, last_look, best_at_look = (
                    torch.zeros_like(fell),
                    number,
                    trial.best_loss.clone(),
                )
            ahead = trial.project(pixels - eta.view(shape) * gradient.sign())
            moved = pixels + self.alpha * (ahead - pixels)
            if number > 0:
                moved = moved + (1.0 - self.alpha) * (pixels - before)
            before, pixels = pixels, trial.project(moved if number > 0 else ahead)
        trial.close(pixels)

    def _on_the_surface(self, trial: Trial) -> Tensor:
        """(B, 3, H, W) a random point of each ball whose largest change is the budget."""
        shape = trial.clean.shape[1:]
        noise = torch.stack([2.0 * torch.rand(shape, generator=g) - 1.0 for g in trial.generators])
        noise = noise / noise.abs().flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        return trial.project(trial.clean + self.eps_255 / 255.0 * noise.to(trial.clean))
