"""PGD on one image against many requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.facts import Budget
from vqguard.redteam.universal import UniversalAttack
from vqguard.redteam.universal_trial import UniversalTrial


@dataclass(frozen=True, kw_only=True)
class UniversalPGD(UniversalAttack):
    """PGD on one image whose loss is the mean over a mini-batch of requests, new at every step."""

    name: ClassVar[str] = "universal"
    label: ClassVar[str] = "Universal"
    sentence: ClassVar[str] = (
        "PGD with momentum on one picture, towards the openings of many requests' answers; judged "
        "on requests that it did not see."
    )

    pgd: PGD = field(default_factory=PGD)
    """Budget, steps, step size, momentum, decay, restarts, seed, judgement interval."""

    @classmethod
    def within(cls, budget: Budget) -> UniversalPGD:
        """See `MeasuredAttack.within`."""
        return cls(pgd=PGD.within(budget), requests_per_step=8)

    @property
    def budget(self) -> Budget:
        """See `UniversalAttack.budget`."""
        pgd = self.pgd
        return Budget(pgd.eps_255, pgd.steps, pgd.restarts, pgd.seed, pgd.judge_every)

    def run(self, trial: UniversalTrial, start: Tensor) -> None:
        """See `UniversalAttack.run`."""
        self.pgd.descend(trial, start)
