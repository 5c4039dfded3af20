"""Query only: the attacker sees answers, no loss and no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam.attack import Attack
from vqguard.redteam.threat import ThreatModel
from vqguard.redteam.trial import Trial


@runtime_checkable
class AnsweringTarget(Protocol):
    """A victim whose answers can be read."""

    def answers(self, pixels: Tensor, request: Tensor) -> list[str]:
        """What it says: B texts."""
        ...

    def progress(self, texts: list[str], request: Tensor) -> Tensor:
        """(B,) how far each answer goes along its opening, in [0, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Attack):
    """Random squares, kept where the answer follows its opening no less far; `steps` are queries.

    It moves on a plateau too, so that it walks where all answers are refusals.
    """

    name: ClassVar[str] = "query_only"
    label: ClassVar[str] = "Random search (answers only)"
    sentence: ClassVar[str] = (
        "A random search that sees nothing but answers and keeps what brings them no further from "
        "the wanted opening."
    )
    measured: ClassVar[bool] = False
    threat: ClassVar[ThreatModel | None] = ThreatModel.DECISIONS

    share: float = 0.25
    """Share of the picture that a square covers at most."""

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = trial.target
        if not isinstance(target, AnsweringTarget):
            raise ConfigError(
                f"the attack {self.name!r} reads answers, and {type(target).__name__} gives none"
            )
        eps = self.eps_255 / 255.0
        height, width = start.shape[2:]
        most = max(1, round((self.share * height * width) ** 0.5))
        pixels = start
        kept = torch.full_like(trial.best_loss, -1.0)
        for _ in range(self.steps):
            if trial.finished:
                return
            tried = pixels.clone()
            for row in trial.active.tolist():
                generator = trial.generators[row]
                side = int(torch.randint(1, most + 1, (1,), generator=generator))
                top = int(torch.randint(0, height - side + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - side + 1, (1,), generator=generator))
                colour = 2.0 * torch.rand(3, 1, 1, generator=generator) - 1.0
                window = (row, slice(None), slice(top, top + side), slice(left, left + side))
                tried[window] = trial.clean[window] + colour.to(start) * eps
            tried = trial.project(tried)
            rows = trial.active
            texts = target.answers(tried[rows], trial.request[rows])
            reached = torch.full_like(kept, -1.0)
            reached[rows] = target.progress(texts, trial.request[rows]).to(kept)
            better = reached >= kept
            pixels = torch.where(better.view(-1, 1, 1, 1), tried, pixels)
            kept = torch.where(better, reached, kept)
            trial.observe(tried, 1.0 - reached)
        trial.judge()
