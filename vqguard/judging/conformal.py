"""Thresholds that keep a false-positive budget: split conformal calibration.

One threshold: of n scores that neither counting nor training saw, the ceil((n + 1)(1 - budget))-th
smallest is the threshold, and a score above it is flagged. A new image that is exchangeable with
the n is then flagged with probability at most the budget, whatever the scores' distribution and for
every n (V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005; A.
Angelopoulos, S. Bates, arXiv 2107.07511). The probability is over calibration and image together.

Several thresholds share the budget by J. W. Tukey's statistically equivalent blocks
("Non-parametric estimation II", Ann. Math. Stat. 18, 1947; III, 19, 1948, for ties): n scores cut
the space into n + 1 blocks, each of which holds a new image with probability 1 / (n + 1), and
B = floor((n + 1) budget) of them may be flagged. The thresholds take theirs one after the other,
each from the images that those before it left. A new image is above any of them with probability at
most B / (n + 1), which is no more than the budget; with one threshold this is the rule above.

For one calibration, the share of new images that are flagged is Beta(B, n + 1 - B) where scores are
continuous, and stochastically smaller where some are tied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.intervals import clopper_pearson
from vqguard.judging.thresholds import FalsePositives


def least_images(budget: float, thresholds: int = 1) -> int:
    """The smallest n with which `thresholds` thresholds can share a budget."""
    return math.ceil(thresholds / budget - 1e-9) - 1


def require_images(
    n: int,
    budget: float,
    *,
    names: Sequence[str],
    images: str = "held-out neutral images",
) -> int:
    """How many blocks n images give the thresholds of these names to share.

    Raises:
        InputError: where they are too few for the budget, with the number that would do.
    """
    if not 0.0 < budget < 1.0:
        raise InputError(f"a false-positive budget lies between 0 and 1, got {budget}")
    blocks, groups = math.floor((n + 1) * budget + 1e-9), len(names)
    if blocks < groups:
        sharing = "" if groups == 1 else f" shared by {groups} thresholds ({', '.join(names)})"
        raise InputError(
            f"{n} {images} cannot hold a false-positive rate of {budget:.2%}{sharing}: use at least"
            f" {least_images(budget, groups)} of them, or a larger budget"
        )
    return blocks


def conformal_thresholds(
    scores: Tensor,
    budget: float,
    *,
    highest: Sequence[float],
    names: Sequence[str],
    shares: Sequence[float] | None = None,
    images: str = "held-out neutral images",
) -> tuple[list[float], FalsePositives]:
    """G thresholds above which at most `budget` of images like these are flagged, by any of them.

    Args:
        scores: (n, G) float64, what each image scores by each threshold's own measure; infinite
            where no threshold plays a part.
        budget: the probability that a new image is flagged, between 0 and 1.
        highest: (G,) the highest score that any image could have.
        names: (G,) how messages call them.
        shares: (G,) positive weights by which the blocks are shared; equal ones by default. They,
            and the order of the thresholds, must be chosen without looking at the scores.
        images: how messages call the images.

    Raises:
        InputError: where n is too small for the budget, and where ties leave no threshold: nothing
            at all would lie above it.
    """
    n, groups = scores.shape
    blocks = require_images(n, budget, names=names, images=images)
    left = scores
    thresholds: list[float] = []
    for group, taken in enumerate(_shared(blocks, shares or [1.0] * groups)):
        order = left[:, group].argsort(descending=True, stable=True)
        threshold = float(left[order[taken - 1], group])
        if not highest[group] > threshold:
            raise InputError(
                f"no threshold keeps false positives at {budget:.2%}: for {names[group]} the"
                f" highest score of any cell is {highest[group]:.3f}, and"
                f" {int((scores[:, group] >= highest[group]).sum())} of {n} {images} have it"
                f" ({taken - 1} may). Calibrate with more images, a larger semantic codebook, or a"
                " larger budget"
            )
        thresholds.append(threshold)
        left = left[order[taken:]]
    flagged = int((scores > torch.tensor(thresholds, dtype=scores.dtype)).any(dim=1).sum())
    low, high = clopper_pearson(flagged, n).low, clopper_pearson(blocks - 1, n).high
    return thresholds, FalsePositives(budget, flagged, n, low, high, conformal=True)


def _shared(blocks: int, shares: Sequence[float]) -> list[int]:
    """`blocks` in whole parts by weight, each at least 1: the largest remainders are rounded up."""
    if any(not 0.0 < share < math.inf for share in shares):
        raise InputError(f"shares of a budget must be positive numbers, got {list(shares)}")
    free = blocks - len(shares)
    exact = [free * share / sum(shares) for share in shares]
    parts = [1 + math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda g: math.floor(exact[g]) - exact[g])
    for group in by_remainder[: blocks - sum(parts)]:
        parts[group] += 1
    return parts
