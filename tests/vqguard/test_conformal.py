from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqguard.errors import InputError
from vqguard.judging.conformal import conformal_thresholds, least_images


def _one(scores: Tensor, budget: float, highest: float = math.inf) -> float:
    [threshold], _ = conformal_thresholds(
        scores[:, None], budget, highest=[highest], names=["all categories"]
    )
    return threshold


@settings(deadline=None, max_examples=60)
@given(scores=st.lists(st.integers(0, 30), min_size=9, max_size=60), budget=st.floats(0.1, 0.9))
def test_the_threshold_is_the_order_statistic_of_split_conformal_prediction(
    scores: list[int], budget: float
) -> None:
    n = len(scores)
    rank = math.ceil((n + 1) * (1 - budget) - 1e-9)
    assert _one(torch.tensor(scores).double(), budget) == sorted(scores)[rank - 1]


def _simulate(groups: int, n: int, budget: float, levels: int | None) -> tuple[float, float]:
    """Mean rate of false positives over 1 000 calibrations, and how many intervals hold theirs.

    Scores of the groups are correlated uniforms, so that the true rate is known from many fresh
    images; with `levels` they are tied on as many values.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(count: int) -> Tensor:
        shared = torch.rand(count, 1, generator=generator, dtype=torch.float64)
        own = torch.rand(count, groups, generator=generator, dtype=torch.float64)
        scores = 0.5 * shared + 0.5 * own
        return scores if levels is None else (scores * levels).floor() / levels

    fresh = draw(40_000)
    names = [f"group {g}" for g in range(groups)]
    rates, covered = [], 0
    for _ in range(1000):
        thresholds, measured = conformal_thresholds(
            draw(n), budget, highest=[math.inf] * groups, names=names
        )
        rate = float((fresh > torch.tensor(thresholds).double()).any(dim=1).double().mean())
        rates.append(rate)
        covered += measured.low <= rate <= measured.high
    return sum(rates) / len(rates), covered / len(rates)


@pytest.mark.parametrize(
    ("groups", "n", "budget", "levels"),
    [(1, 99, 0.01, None), (1, 300, 0.05, None), (4, 199, 0.05, None), (3, 250, 0.04, 40)],
)
def test_over_1000_calibrations_the_budget_is_kept_and_intervals_cover(
    groups: int, n: int, budget: float, levels: int | None
) -> None:
    mean, covered = _simulate(groups, n, budget, levels)
    # the mean of 1 000 rates, each Beta with a variance below budget / n
    error = math.sqrt(budget / n / 1000) + math.sqrt(budget / 40_000)
    assert mean <= budget + 3 * error
    if levels is None:  # no block is lost to ties: not a rule that flags nothing
        assert mean >= math.floor((n + 1) * budget + 1e-9) / (n + 1) - 3 * error
    assert covered >= 0.95 - 0.02


def test_too_few_images_are_refused_with_the_number_that_would_do() -> None:
    for budget, groups in [(0.01, 1), (0.05, 1), (0.01, 7), (0.3, 2)]:
        n = least_images(budget, groups)
        arguments = {"highest": [math.inf] * groups, "names": [f"c{g}" for g in range(groups)]}
        conformal_thresholds(torch.rand(n, groups).double(), budget, **arguments)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"use at least {n} of them"):
            conformal_thresholds(torch.rand(n - 1, groups).double(), budget, **arguments)  # type: ignore[arg-type]
    assert least_images(0.01) == 99


def test_ties_that_leave_no_threshold_are_refused_by_name() -> None:
    tied = torch.tensor([[0.9, 0.1]] * 3 + [[0.0, 0.0]] * 97, dtype=torch.float64)
    with pytest.raises(InputError, match=r"for gun the highest score of any cell is 0\.900, and 3"):
        conformal_thresholds(tied, 0.04, highest=[0.9, 0.9], names=["gun", "knife"])
    # 8 blocks, 4 each: the 4th image scores 0
    thresholds, measured = conformal_thresholds(
        tied, 0.08, highest=[0.9, 0.9], names=["gun", "knife"]
    )
    assert thresholds == [0.0, 0.0]
    assert measured.flagged == 3


def test_shares_move_the_budget_between_thresholds() -> None:
    scores = torch.rand(999, 2, generator=torch.Generator().manual_seed(1)).double()

    def flagged(shares: list[float]) -> list[int]:
        thresholds, _ = conformal_thresholds(
            scores, 0.1, highest=[1.0, 1.0], names=["a", "b"], shares=shares
        )
        return (scores > torch.tensor(thresholds).double()).sum(dim=0).tolist()

    even, uneven = flagged([1.0, 1.0]), flagged([9.0, 1.0])
    assert uneven[0] > even[0]
    assert uneven[1] < even[1]
    for shares in ([0.0, 1.0], [math.inf, 1.0], [math.nan, 1.0]):
        with pytest.raises(InputError, match="positive numbers"):
            flagged(shares)
