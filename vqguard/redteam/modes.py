"""What there is to know of a way for the gradient to cross the quantiser."""

from __future__ import annotations

from dataclasses import dataclass

from vqguard.codebooks.quantizer import Estimator
from vqguard.redteam.threat import ThreatModel


@dataclass(frozen=True)
class GradientMode:
    """How an attacker's gradient crosses the quantiser, and what attacker that makes."""

    name: str
    """The word in records, as condition `gradient`."""
    label: str
    """The words in a report's tables."""
    threat_model: ThreatModel
    """The attacker."""
    estimator: Estimator
    """Features (..., d), codewords (P, d), indices (...) int64 -> (..., d), what
    `vqguard.codebooks.quantizer.use_estimator` takes."""
    needs_quantiser: bool = True
    """False for one that crosses nothing, and so fits a model without a guard."""
    measured: bool = True
    """Whether every report attacks by it the models that it fits; else only attacks that ask for it
    do."""

    @property
    def sentence(self) -> str:
        """What this attacker knows and can do, in one sentence."""
        return self.threat_model.sentence

    @property
    def adaptive(self) -> bool:
        """Whether the attacker knows of the quantiser and works around it."""
        return self.threat_model.adaptive
