"""What was measured while a threshold was chosen, and the curve over all thresholds.

How one is chosen is in `vqguard.judging.conformal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vqguard.errors import InputError
from vqguard.strict import StrictData


@dataclass(frozen=True)
class FalsePositives(StrictData):
    """The false-positive budget that a threshold was chosen for, and the rate behind it."""

    budget: float
    """The rate asked for, 0 to 1."""
    flagged: int
    """Held-out images that are flagged; the threshold was chosen on them."""
    n: int
    """Held-out images."""
    low: float
    """Lower end of a 95 % interval of the rate on new images."""
    high: float
    """Upper end of it. It takes into account that the threshold was chosen on the same images."""
    conformal: bool = False
    """Whether the budget is guaranteed for new images that are exchangeable with these. Older
    maps kept it on the held-out images alone; `low` and `high` are then the Wilson interval of
    flagged / n, a little optimistic."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without `conformal` where it is False, as older versions wrote it."""
        values = super().to_dict()
        return values if self.conformal else {k: v for k, v in values.items() if k != "conformal"}


def roc_curve(scores: Tensor, neutral: Tensor) -> list[tuple[float, float, float]]:
    """(tau, false-positive rate, true-positive rate) for every tau that changes an answer.

    `scores` float64 (n,) image scores, `neutral` (n,) bool. Ascending in tau.

    Raises:
        InputError: unless there are both neutral and toxic images.
    """
    if bool(neutral.all()) or not bool(neutral.any()):
        raise InputError("an ROC needs neutral and toxic images")
    taus = sorted({0.0, *(score for score in scores.tolist() if 0.0 <= score < 1.0)})
    return [
        (
            tau,
            float((scores[neutral] > tau).double().mean()),
            float((scores[~neutral] > tau).double().mean()),
        )
        for tau in taus
    ]
