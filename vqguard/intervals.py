"""95 % intervals for the numbers in a report.

`wilson` for rates (good coverage at small n and never empty at 0 or n successes),
`clopper_pearson` where coverage must be guaranteed, `median_interval` for medians (of any
distribution), `bootstrap` for means.
Binomial tails are scipy's, imported where they are needed: it takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vqguard.errors import InputError

__all__ = ["Interval", "bootstrap", "clopper_pearson", "median_interval", "wilson"]

# A resampled block of this many values is 32 MB of float64.
_BLOCK_VALUES = 4_000_000


class Interval(NamedTuple):
    """A closed interval, in the unit of the estimate it belongs to."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927), without continuity correction.

    Args:
        successes: number of successes, 0..n.
        n: number of trials, at least 1.
        confidence: two-sided coverage, in (0, 1).

    Returns:
        The interval, inside [0, 1] and containing successes / n.

    Raises:
        InputError: if a count or the confidence is out of range.
    """
    _check_counts(successes, n)
    z = NormalDist().inv_cdf(0.5 + _checked_confidence(confidence) / 2)
    rate = successes / n
    scale = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exact; rounding must not push it past the estimate.
    low = 0.0 if successes == 0 else min(max(centre - half, 0.0), rate)
    high = 1.0 if successes == n else max(min(centre + half, 1.0), rate)
    return Interval(low, high)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact (conservative) interval of a rate.

    Source: C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits",
    Biometrika 26 (1934). The bounds are the rates at which the binomial tail beyond
    `successes` has probability (1 - confidence) / 2. Arguments, result and errors are those of
    `wilson`.
    """
    _check_counts(successes, n)
    from scipy.special import betaincinv  # kept out of start-up

    tail = (1 - _checked_confidence(confidence)) / 2
    # P(X >= k) grows with the rate and equals I_rate(k, n - k + 1); P(X <= k) falls with it and
    # equals 1 - I_rate(k + 1, n - k).
    low = betaincinv(successes, n - successes + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return Interval(float(low), float(high))


def bootstrap(
    values: Sequence[float] | npt.NDArray[np.floating],
    seed: int,
    *,
    statistic: Literal["mean", "median"] = "mean",
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of a mean or a median.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of
    Statistics 7 (1979). The interval is widened, where needed, to hold the estimate itself.

    Args:
        values: (n,) finite numbers, n at least 2. Independent: resample whole groups
            yourself if they are not.
        seed: seed of the resampling; the same seed gives the same interval.
        statistic: "mean" or "median".
        confidence: two-sided coverage, in (0, 1).
        resamples: number of bootstrap samples, at least 100.

    Returns:
        The interval, in the unit of the values.

    Raises:
        InputError: if the values are not a vector of at least two finite numbers, or an
            option is out of range.
    """
    confidence = _checked_confidence(confidence)
    data = _finite_vector(values, "bootstrap", least=2)
    if resamples < 100:
        raise InputError(f"resamples must be at least 100, got {resamples}")
    if statistic not in ("mean", "median"):
        raise InputError(f'statistic must be "mean" or "median", got {statistic!r}')
    reduce = np.mean if statistic == "mean" else np.median
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_VALUES // data.size)
    estimates: list[npt.NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        picks = generator.integers(0, data.size, size=(count, data.size))
        estimates.append(np.asarray(reduce(data[picks], axis=1), dtype=np.float64))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    estimate = float(reduce(data))
    return Interval(min(float(low), estimate), max(float(high), estimate))


def median_interval(
    values: Sequence[float] | npt.NDArray[np.floating], confidence: float = 0.95
) -> Interval | None:
    """Interval of a median between two order statistics: no distribution is assumed.

    Source: W. R. Thompson, "On confidence ranges for the median and other expectation
    distributions for populations of unknown distribution form", Annals of Mathematical
    Statistics 7 (1936). With x_(1) <= ... <= x_(n), the interval from x_(r) to x_(n+1-r)
    misses the median with probability 2 P(Binomial(n, 1/2) < r) at most; r is the largest
    that keeps this within 1 - confidence, so the coverage is at least what is asked for.

    Args:
        values: (n,) finite numbers, n at least 1; independent.
        confidence: two-sided coverage, in (0, 1).

    Returns:
        The interval, in the unit of the values; it holds their median. None where even the
        whole range covers less (at 95 %: n below 6).

    Raises:
        InputError: if the values are not a vector of finite numbers, or the confidence is
            out of range.
    """
    from scipy.special import bdtr  # kept out of start-up

    allowed = 1 - _checked_confidence(confidence)
    data = np.sort(_finite_vector(values, "median_interval", least=1))
    below = np.arange((data.size + 1) // 2)
    rank = int(np.count_nonzero(2 * bdtr(below, data.size, 0.5) <= allowed))
    if rank == 0:
        return None
    return Interval(float(data[rank - 1]), float(data[data.size - rank]))


def _finite_vector(
    values: Sequence[float] | npt.NDArray[np.floating], name: str, least: int
) -> npt.NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size < least:
        raise InputError(
            f"{name} needs a vector of at least {least} value{'s' * (least > 1)}, got shape "
            f"{data.shape}; record a single measurement without an interval"
        )
    if not np.isfinite(data).all():
        first = int(np.flatnonzero(~np.isfinite(data))[0])
        raise InputError(f"{name} needs finite values, value {first} is {data[first]}")
    return data


def _check_counts(successes: int, n: int) -> None:
    if n < 1:
        raise InputError(f"a rate needs at least one trial, got n = {n}; leave it unmeasured")
    if not 0 <= successes <= n:
        raise InputError(f"successes must lie in 0..{n}, got {successes}")


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
