"""Transfer: a picture made on another model, shown to this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam.attack import entered
from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.facts import MadeOn
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import AttackTarget, Steered, Trial


@dataclass(frozen=True, kw_only=True)
class Transfer(PGD):
    """PGD on a stand-in; every `judge_every` steps the victim is shown what it has come to.

    Raises:
        ConfigError: when it runs without a stand-in.
    """

    name: ClassVar[str] = "transfer"
    label: ClassVar[str] = "Transfer from the undefended model"
    sentence: ClassVar[str] = (
        "PGD on another model, the undefended one unless said otherwise, and the picture shown to "
        "the victim every few steps."
    )
    measured: ClassVar[bool] = False
    on_controls: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.TRANSFER
    made_on: ClassVar[tuple[MadeOn, ...]] = (MadeOn.UNDEFENDED,)

    stand_in: AttackTarget | None = None
    """The model that the picture is made on, with the same requests."""

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        if self.stand_in is None:
            raise ConfigError(
                f"the attack {self.name!r} needs a model to make its pictures on; give stand_in, "
                "or run it by `vqguard attack` where the undefended model is known, or with "
                "--surrogate RUN"
            )
        with entered(self.stand_in):
            self.descend(Steered(trial, self.stand_in.loss), start)


@dataclass(frozen=True, kw_only=True)
class SurrogateTransfer(Transfer):
    """`Transfer` from guarded models of other runs: the attacker trained a guard of his own."""

    name: ClassVar[str] = "transfer_surrogate"
    label: ClassVar[str] = "Transfer from other runs"
    sentence: ClassVar[str] = (
        "PGD on the guarded models of other runs, as of another seed, through their quantisers and "
        "past their verdicts, and the picture shown to the victim every few steps."
    )
    made_on: ClassVar[tuple[MadeOn, ...]] = (MadeOn.OTHER_RUNS,)
