"""Many pictures in one message: the attack spread over all of them, or in one among clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.facts import Message
from vqguard.redteam.trial import Trial


@dataclass(frozen=True, kw_only=True)
class SeveralPictures(PGD):
    """PGD on a strip of pictures (`pixels.strip`): as many times the pixels at the same budget."""

    name: ClassVar[str] = "several_pictures"
    label: ClassVar[str] = "Several pictures in a message"
    sentence: ClassVar[str] = (
        "PGD on all pictures of a message that shows several, each within the budget, towards the "
        "opening of one request's answer."
    )
    measured: ClassVar[bool] = False

    pictures: int = 3
    """How many there are."""

    @property
    def message(self) -> Message:
        """See `MeasuredAttack.message`."""
        return Message(pictures=self.pictures)

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        few = [f"pictures must be at least 2, got {self.pictures}"] * (self.pictures < 2)
        return [*super().problems(), *few]


@dataclass(frozen=True, kw_only=True)
class OneAmongClean(SeveralPictures):
    """One picture of the strip moves; the others stay as they are, to the bit."""

    name: ClassVar[str] = "one_among_clean"
    label: ClassVar[str] = "One picture among clean ones"
    sentence: ClassVar[str] = (
        "PGD on one picture of a message that shows several clean ones beside it, towards the "
        "opening of one request's answer."
    )

    place: int = 0
    """Which of them is attacked, from 0."""

    def problems(self) -> list[str]:
        """See `Attack.problems`."""
        outside = not 0 <= self.place < self.pictures
        told = f"place must be in [0, {self.pictures}), got {self.place}"
        return [*super().problems(), *[told] * outside]

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        height = start.shape[2] // self.pictures
        moves = torch.zeros_like(start, dtype=torch.bool)
        moves[:, :, self.place * height : (self.place + 1) * height] = True
        self.descend(_Held(trial, moves), torch.where(moves, start, trial.clean))


class _Held:
    """A trial of which some pixels stay."""

    def __init__(self, trial: Trial, moves: Tensor) -> None:
        self.trial = trial
        self.moves = moves

    @property
    def finished(self) -> bool:
        return self.trial.finished

    def gradient(self, pixels: Tensor) -> Tensor:
        return self.trial.gradient(pixels) * self.moves

    def project(self, pixels: Tensor) -> Tensor:
        return self.trial.project(pixels)

    def close(self, pixels: Tensor) -> None:
        self.trial.close(pixels)
