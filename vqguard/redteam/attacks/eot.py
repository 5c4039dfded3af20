"""Expectation over transformations: a picture that holds its effect when it is moved and dimmed.

Athalye et al. 2018 (arXiv 1707.07397).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.trial import Loss, Steered, Trial


def transformed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) shifted by up to 3 %, scaled by up to 5 %, dimmed by up to 10 %, with noise.

    Differentiable; one draw for the whole batch, the noise apart.
    """
    shift, size, light = torch.rand(3, generator=generator).tolist()
    turn = torch.rand(1, generator=generator).item()
    scale = 1.0 + 0.1 * (size - 0.5)
    move = torch.tensor([[scale, 0.0, 0.12 * (shift - 0.5)], [0.0, scale, 0.12 * (turn - 0.5)]])
    grid = F.affine_grid(move.expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid.to(pixels), padding_mode="border", align_corners=False)
    noise = torch.randn(pixels.shape[1:], generator=generator).to(pixels) * 2.0 / 255.0
    seen: Tensor = (moved * (0.9 + 0.2 * light) + noise).clamp(0.0, 1.0)
    return seen


def expectation(loss: Loss, draws: int, generator: torch.Generator) -> Loss:
    """The mean of a loss over `draws` transformed copies, the plain one among them."""

    def mean(pixels: Tensor, request: Tensor) -> Tensor:
        total = loss(pixels, request)
        for _ in range(draws - 1):
            total = total + loss(transformed(pixels, generator), request)
        return total / draws

    return mean


@dataclass(frozen=True, kw_only=True)
class EOT(PGD):
    """PGD on the mean loss over transformed copies."""

    name: ClassVar[str] = "eot"
    label: ClassVar[str] = "Expectation over transformations"
    sentence: ClassVar[str] = (
        "PGD on the mean loss of moved, scaled, dimmed and noisy copies of each picture."
    )
    measured: ClassVar[bool] = False

    draws: int = 4
    """Copies a step, the plain picture among them."""

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws transformations."""
        return True

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        few = self.draws < 1
        return [*super().problems(), *[f"draws must be at least 1, got {self.draws}"] * few]

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        generator = torch.Generator().manual_seed(self.seed)
        mean = expectation(trial.target.loss, self.draws, generator)
        self.descend(Steered(trial, mean), start)
