"""Intervals against exact binomial arithmetic, known values and coverage."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard.errors import InputError
from vqguard.intervals import bootstrap, clopper_pearson, median_interval, wilson


@st.composite
def counts(draw: st.DrawFn, largest: int = 5000) -> tuple[int, int]:
    n = draw(st.integers(1, largest))
    return draw(st.integers(0, n)), n


def tail_at_least(k: int, n: int, rate: float) -> float:
    """P(X >= k) for X ~ Binomial(n, rate), in exact rational arithmetic."""
    p = Fraction(rate)
    return float(sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1)))


@given(counts())
def test_intervals_hold_the_rate_and_stay_in_the_unit_interval(case: tuple[int, int]) -> None:
    k, n = case
    for low, high in (wilson(k, n), clopper_pearson(k, n)):
        assert 0 <= low <= k / n <= high <= 1
        assert low < high


@given(counts())
def test_swapping_success_and_failure_mirrors_the_interval(case: tuple[int, int]) -> None:
    k, n = case
    for method in (wilson, clopper_pearson):
        low, high = method(k, n)
        mirrored = method(n - k, n)
        assert math.isclose(low, 1 - mirrored.high, abs_tol=1e-9)
        assert math.isclose(high, 1 - mirrored.low, abs_tol=1e-9)


@given(counts(largest=60))
@settings(deadline=None, max_examples=60)
def test_clopper_pearson_bounds_are_the_exact_binomial_tails(case: tuple[int, int]) -> None:
    k, n = case
    low, high = clopper_pearson(k, n)
    if k > 0:
        assert tail_at_least(k, n, low) == pytest.approx(0.025, rel=1e-8)
    if k < n:
        assert 1 - tail_at_least(k + 1, n, high) == pytest.approx(0.025, rel=1e-8)


@pytest.mark.parametrize(("n", "k"), [(20, 0), (20, 20), (300, 0), (100_000, 0)])
def test_clopper_pearson_at_the_ends_has_a_closed_form(n: int, k: int) -> None:
    low, high = clopper_pearson(k, n)
    bound = -math.expm1(math.log(0.025) / n)  # 1 - 0.025^(1/n)
    if k == 0:
        assert low == 0
        assert high == pytest.approx(bound, rel=1e-9)
    else:
        assert high == 1
        assert low == pytest.approx(1 - bound, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (1, 7, 0.003610296861900589, 0.578723197043195),
        (19, 20, 0.7512672372279723, 0.9987349105020502),
        (1, 2000, 1.2658823868577923e-05, 0.0027826398346585957),
    ],
)
def test_clopper_pearson_is_what_bisection_of_the_tail_found(
    k: int, n: int, low: float, high: float
) -> None:
    assert clopper_pearson(k, n) == pytest.approx((low, high), abs=1e-12)


def test_wilson_solves_its_defining_equation() -> None:
    # The bounds are the rates p at which |k/n - p| = z sqrt(p (1 - p) / n).
    z = 1.959963984540054
    for k, n in [(1, 7), (5, 16), (285, 300), (50_000, 100_000)]:
        for bound in wilson(k, n):
            assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))


def test_intervals_shrink_with_n_and_grow_with_confidence() -> None:
    for method in (wilson, clopper_pearson):
        small, large = method(8, 16), method(800, 1600)
        assert small.high - small.low > 5 * (large.high - large.low)
        sure = method(8, 16, confidence=0.99)
        assert sure.low < small.low
        assert sure.high > small.high


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
def test_clopper_pearson_covers_at_least_what_it_says(rate: float) -> None:
    n = 40
    covered = 0.0
    for k in range(n + 1):
        low, high = clopper_pearson(k, n)
        if low <= rate <= high:
            covered += math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
    assert covered >= 0.95


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5), (1, -2)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    for method in (wilson, clopper_pearson):
        with pytest.raises(InputError):
            method(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(InputError, match="confidence"):
        wilson(1, 2, confidence)
    with pytest.raises(InputError, match="confidence"):
        bootstrap([1.0, 2.0], 0, confidence=confidence)


def test_bootstrap_of_a_mean_matches_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    low, high = bootstrap(values, seed=0)
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.sampled_from(["mean", "median"]))
@settings(deadline=None, max_examples=50)
def test_bootstrap_holds_its_estimate(
    values: list[float], statistic: Literal["mean", "median"]
) -> None:
    low, high = bootstrap(values, 1, statistic=statistic, resamples=100)
    estimate = float(np.mean(values) if statistic == "mean" else np.median(values))
    assert low <= estimate <= high
    assert min(values) - 1e-6 <= low
    assert high <= max(values) + 1e-6


def test_bootstrap_depends_on_the_seed_only() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0, 7.0]
    assert bootstrap(values, 0) == bootstrap(np.array(values), 0)
    assert bootstrap(values, 0, statistic="median") != bootstrap(values, 0)


def test_bootstrap_gives_the_same_interval_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(range(50))
    whole = bootstrap(values, 0)
    monkeypatch.setattr("vqguard.intervals._BLOCK_VALUES", 320)
    assert bootstrap(values, 0) == whole


@pytest.mark.parametrize(
    "values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0, 2.0], [3.0, 4.0]]]
)
def test_bootstrap_refuses_what_it_cannot_resample(values: list[float]) -> None:
    with pytest.raises(InputError, match="bootstrap needs"):
        bootstrap(values, 0)


def test_bootstrap_refuses_bad_options() -> None:
    with pytest.raises(InputError, match="resamples"):
        bootstrap([1.0, 2.0], 0, resamples=5)
    with pytest.raises(InputError, match="statistic"):
        bootstrap([1.0, 2.0], 0, statistic="mode")  # type: ignore[arg-type]


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.95, 0.99])
)
def test_median_interval_takes_the_innermost_order_statistics_that_cover(
    values: list[float], confidence: float
) -> None:
    n = len(values)
    ranked = sorted(values)
    # 1-based ranks whose interval misses the median rarely enough, in exact arithmetic.
    missed = {r: 2 * sum(math.comb(n, i) for i in range(r)) / 2**n for r in range(1, n // 2 + 1)}
    fit = [r for r, chance in missed.items() if chance <= 1 - confidence]
    found = median_interval(values, confidence)
    if not fit:
        assert found is None
        return
    assert found == (ranked[max(fit) - 1], ranked[n - max(fit)])
    assert found[0] <= np.median(values) <= found[1]


@pytest.mark.parametrize(("n", "rank"), [(6, 1), (10, 2), (15, 4), (20, 6), (30, 10), (1000, 469)])
def test_median_interval_ranks_are_those_of_the_printed_tables(n: int, rank: int) -> None:
    assert median_interval(range(1, n + 1)) == (rank, n + 1 - rank)
    assert median_interval(range(5)) is None


def test_median_interval_covers_the_median_of_a_skewed_distribution() -> None:
    samples = np.random.default_rng(0).exponential(size=(2000, 15))
    found = [median_interval(row) for row in samples]
    covered = [i is not None and i.low <= math.log(2) <= i.high for i in found]
    # Exactly 0.9648 for n = 15; four standard deviations of the estimate are 0.017.
    assert abs(np.mean(covered) - 0.9648) < 0.017


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_median_interval_refuses_what_has_no_order(values: list[float]) -> None:
    with pytest.raises(InputError, match="median_interval needs"):
        median_interval(values)
