"""Transfer: a picture made on another model, shown to this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam.attacks.pgd import PGD
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

    stand_in: AttackTarget | None = None
    """The model that the picture is made on, with the same requests."""

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        if self.stand_in is None:
            raise ConfigError(
                "the attack 'transfer' needs a model to make its pictures on; give stand_in, or "
                "run it by `vqguard attack` on a run whose undefended model is there"
            )
        self.descend(Steered(trial, self.stand_in.loss), start)
