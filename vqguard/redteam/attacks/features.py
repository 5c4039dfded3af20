"""The label-free attack: push features over the walls of their cells, no answer in sight.

After the unsupervised attacks on discrete tokenisers of arXiv 2602.18252. The attacker needs the
vision encoder and the codebook, and no language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attacks.pgd import PGD
from vqguard.redteam.quantised import (
    QuantisedTarget,
    features_and_verdict,
    nearest_other,
    quantised,
)
from vqguard.redteam.trial import Steered, Trial


@dataclass(frozen=True)
class LeaveCells:
    """How many tokens are still in the cells of the clean picture, softly, and how deep."""

    target: QuantisedTarget
    codes: Tensor
    """(R, N) int64 of the clean pictures."""
    rows: dict[int, int]
    """Request number -> row of `codes`."""
    margin: float = 0.05

    def __call__(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) of pixels (B, 3, H, W)."""
        features, verdict = features_and_verdict(self.target, pixels)
        words = self.target.codewords
        codes = self.codes[[self.rows[number] for number in request.tolist()]]
        own = (features - words[codes]).square().sum(dim=-1)
        others = nearest_other(features, words, codes)
        total = (own + others).clamp_min(torch.finfo(features.dtype).tiny)
        depth = ((others - own) / total + self.margin).clamp_min(0.0)
        return depth.mean(dim=1) + verdict


@dataclass(frozen=True, kw_only=True)
class FeaturePush(PGD):
    """PGD that drives every token out of its cell; what the model then says is another matter."""

    name: ClassVar[str] = "feature_push"
    label: ClassVar[str] = "Features over cell walls (label-free)"
    sentence: ClassVar[str] = (
        "PGD that pushes the visual tokens out of the cells of the clean picture, without looking "
        "at any answer."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("straight_through",)

    @property
    def seeded(self) -> bool:
        """See `MeasuredAttack.seeded`: it draws a nudge."""
        return True

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = quantised(trial.target, self.name)
        with torch.no_grad():
            codes = target.codes(target.features(trial.clean))
        numbers = {number: row for row, number in enumerate(trial.request.tolist())}
        # the middle of a cell is a stationary point: whoever stands there sees no way out
        nudge = torch.stack([torch.rand(start.shape[1:], generator=g) for g in trial.generators])
        start = trial.project(start + (2.0 * nudge.to(start) - 1.0) / 255.0)
        self.descend(Steered(trial, LeaveCells(target, codes, numbers)), start)
