"""One picture for many requests and for models that nobody has seen.

After the universal and transferable images of arXiv 2602.01025: the loss compares meanings instead
of words (the stand-in's own, `aim: semantic`), the picture is moved and dimmed at every step, and a
penalty on its total variation keeps it smooth, so that it fits no single model's noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam.attack import entered
from vqguard.redteam.attacks.eot import expectation
from vqguard.redteam.attacks.universal_pgd import UniversalPGD
from vqguard.redteam.facts import MadeOn
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import AttackTarget, Steered
from vqguard.redteam.universal_trial import UniversalTrial


def total_variation(pixels: Tensor) -> Tensor:
    """(B,) mean absolute difference of neighbours in pixels (B, C, H, W), down and across."""
    down = pixels.diff(dim=2).abs().flatten(1).mean(dim=1)
    across = pixels.diff(dim=3).abs().flatten(1).mean(dim=1)
    return down + across


@dataclass(frozen=True, kw_only=True)
class TransferableUniversal(UniversalPGD):
    """PGD on the stand-in's mean loss over transformed copies and on the total variation.

    Raises:
        ConfigError: a setting out of range, or no stand-in when it runs.
    """

    name: ClassVar[str] = "universal_transfer"
    label: ClassVar[str] = "Universal, transferred"
    sentence: ClassVar[str] = (
        "PGD on one picture for many requests, made on other models with random transformations "
        "and a penalty on its total variation; judged on the victim and on requests that it did "
        "not see."
    )
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.TRANSFER
    made_on: ClassVar[tuple[MadeOn, ...]] = (MadeOn.UNDEFENDED, MadeOn.OTHER_RUNS)

    stand_in: AttackTarget | None = None
    """The model that the picture is made on, or an `Ensemble`, with the same requests."""
    draws: int = 3
    """Copies a step, the plain picture among them."""
    variation: float = 0.5
    """Weight of the total variation, in [0, 1] for pixels in [0, 1], against the stand-in's
    loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1 or self.variation < 0:
            raise ConfigError(
                f"draws must be at least 1 and variation at least 0, got {self.draws} and "
                f"{self.variation}"
            )

    def run(self, trial: UniversalTrial, start: Tensor) -> None:
        """See `UniversalAttack.run`."""
        if self.stand_in is None:
            raise ConfigError(
                f"the attack {self.name!r} needs a model to make its picture on; give stand_in, or "
                "run it by `vqguard attack` where the undefended model is known, or with "
                "--surrogate RUN"
            )
        generator = torch.Generator().manual_seed(self.pgd.seed)
        mean = expectation(self.stand_in.loss, self.draws, generator)

        def objective(pixels: Tensor, request: Tensor) -> Tensor:
            return mean(pixels, request) + self.variation * total_variation(pixels)

        with entered(self.stand_in):
            self.pgd.descend(Steered(trial, objective), start)
