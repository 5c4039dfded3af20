"""The threshold of a safety map: chosen by a false-positive budget, and the curve over all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vqguard.errors import InputError
from vqguard.intervals import wilson
from vqguard.strict import StrictData


@dataclass(frozen=True)
class FalsePositives(StrictData):
    """The false-positive rate measured while tau was chosen, on neutral images held out for it.

    tau was chosen on these images, so the rate is a little optimistic.
    """

    budget: float
    """The rate asked for, 0 to 1."""
    flagged: int
    """Held-out neutral images that the map flags."""
    n: int
    """Held-out neutral images."""
    low: float
    """Lower end of the 95 % Wilson interval of flagged / n."""
    high: float
    """Upper end of it."""


def choose_tau(fpr: float, neutral: Tensor, cells: Tensor) -> tuple[float, FalsePositives]:
    """The most sensitive tau that flags at most `fpr` of the neutral images.

    `neutral` float64 (n,) their image scores, infinite where tau plays no part; `cells` float64
    (K,) what an image with one token of each cell scores.

    Raises:
        InputError: where n is too small to show such a rate (n < 1 / fpr), and where ties leave no
            threshold: every tau within the budget would flag nothing at all.
    """
    if not 0.0 < fpr < 1.0:
        raise InputError(f"a false-positive budget lies between 0 and 1, got {fpr}")
    n = neutral.shape[0]
    allowed = math.floor(fpr * n + 1e-9)
    if allowed < 1:
        raise InputError(
            f"{n} held-out neutral images cannot show a false-positive rate of {fpr:.2%}: use"
            f" at least {math.ceil(1.0 / fpr)}, or a larger budget"
        )
    for tau in _candidates([*cells.tolist(), *neutral.tolist()]):
        false = int((neutral > tau).sum())
        if false <= allowed and bool((cells > tau).any()):
            low, high = wilson(false, n)
            return tau, FalsePositives(fpr, false, n, low, high)
    least = int((neutral >= cells.max()).sum())
    raise InputError(
        f"no threshold keeps false positives at {fpr:.2%}: the cells with the highest score"
        f" {float(cells.max()):.3f} hold {least} of {n} held-out neutral images"
        f" ({allowed} allowed). Calibrate with more images, a larger semantic codebook, or a"
        " larger budget"
    )


def roc_curve(scores: Tensor, neutral: Tensor) -> list[tuple[float, float, float]]:
    """(tau, false-positive rate, true-positive rate) for every tau that changes an answer.

    `scores` float64 (n,) image scores, `neutral` (n,) bool. Ascending in tau.

    Raises:
        InputError: unless there are both neutral and toxic images.
    """
    if bool(neutral.all()) or not bool(neutral.any()):
        raise InputError("an ROC needs neutral and toxic images")
    return [
        (
            tau,
            float((scores[neutral] > tau).double().mean()),
            float((scores[~neutral] > tau).double().mean()),
        )
        for tau in _candidates(scores.tolist())
    ]


def _candidates(scores: list[float]) -> list[float]:
    """Every tau in [0, 1) at which an answer changes."""
    return sorted({0.0, *(score for score in scores if 0.0 <= score < 1.0)})
