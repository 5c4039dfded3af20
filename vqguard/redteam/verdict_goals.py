"""Attacks whose goal is the verdict: what they see of a victim, and what counts as success."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vqguard.redteam.attack import AttackResult
from vqguard.redteam.facts import Goal
from vqguard.redteam.quantised import QuantisedTarget, quantised
from vqguard.redteam.trial import AttackTarget


class VerdictVictim:
    """A guard to an attacker to whom nothing but its verdict matters."""

    def __init__(self, target: QuantisedTarget, goal: Goal) -> None:
        self.target = target
        self.flags = goal is Goal.DENIAL

    @property
    def requests(self) -> int:
        """As the victim's."""
        return self.target.requests

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) how far the image is from the verdict that is wanted."""
        return self.target.verdict_distance(pixels, flagged=self.flags)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: it has that verdict."""
        return (self.target.refused(pixels) == self.flags).to(pixels.device)


class AgainstVerdict:
    """Mixed into an attack, it turns it against the verdict alone: no answer is generated."""

    name: ClassVar[str]
    goal: ClassVar[Goal]
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> AttackResult:
        """See `MeasuredAttack.measure`."""
        attack: Any = self
        victim = VerdictVictim(quantised(target, self.name), self.goal)
        result: AttackResult = attack(victim, images)
        return result
