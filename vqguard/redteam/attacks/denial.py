"""Denial of service: a harmless picture that the guard refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vqguard.redteam.attack import AttackResult
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.quantised import QuantisedTarget, quantised
from vqguard.redteam.trial import AttackTarget


class Deniable:
    """The victim to an attacker who wants its guard to flag a harmless picture."""

    def __init__(self, target: QuantisedTarget) -> None:
        self.target = target

    @property
    def requests(self) -> int:
        """As the victim's."""
        return self.target.requests

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) how far the image is from being flagged."""
        return self.target.denial_loss(pixels)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: it is flagged."""
        return self.target.refused(pixels).to(pixels.device)


@dataclass(frozen=True, kw_only=True)
class DenialOfService(PGD):
    """PGD into the nearest cell that the guard refuses: over-refusal under attack."""

    name: ClassVar[str] = "denial"
    label: ClassVar[str] = "Denial of service"
    sentence: ClassVar[str] = (
        "PGD that pushes a harmless picture into a cell that the guard refuses; success is a "
        "refusal."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("straight_through",)

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> AttackResult:
        """See `MeasuredAttack.measure`."""
        return self(Deniable(quantised(target, self.name)), images)
