"""How a regional judge is trained."""

from __future__ import annotations

from dataclasses import dataclass

from vqguard.strict import StrictConfig, raise_problems


@dataclass(frozen=True)
class RegionalTraining(StrictConfig):
    """The training of the semantic projection, from labels of whole images."""

    steps: int = 1000
    """Optimiser steps."""
    batch: int = 256
    """Images a step: half of them neutral, as many of each category in the other half."""
    learning_rate: float = 4e-3
    """Peak learning rate (AdamW, one cycle)."""
    weight_decay: float = 2e-2
    """AdamW weight decay."""
    whitening: float = 0.0
    """How much of the correlations among the numbers of a visual token is taken out before the
    projection learns; 0: none, each is scaled by itself. With few images what they share by chance
    weighs less. Below 1, at which directions without any spread would have no end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [
            f"{name}: expected more than 0, got {getattr(self, name)}"
            for name in ("steps", "batch", "learning_rate")
            if getattr(self, name) <= 0
        ]
        if self.weight_decay < 0:
            problems.append(f"weight_decay: expected >= 0, got {self.weight_decay}")
        if not 0.0 <= self.whitening < 1.0:
            problems.append(f"whitening: expected a share in [0, 1), got {self.whitening}")
        raise_problems(type(self), problems)
