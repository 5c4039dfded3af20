"""Collects records: whoever measures says what and on how many, the rest is filled in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vqguard.intervals import bootstrap, median_interval, wilson
from vqguard.records import Record, versions
from vqguard.safety_map import Verdict


@dataclass
class Ledger:
    """Records of one run.

    `command` makes the run again; `seed` is the run's.
    """

    command: str
    seed: int
    records: list[Record] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    """What was said of each image: metric, condition, the verdict, each token's code and score."""
    _versions: dict[str, str] = field(default_factory=versions)

    def rate(
        self,
        metric: str,
        subject: str,
        outcomes: Sequence[bool],
        *,
        threat_model: str = "none",
        **condition: Any,
    ) -> Record:
        """A share of cases, with its Wilson interval."""
        hits = sum(bool(o) for o in outcomes)
        low, high = wilson(hits, len(outcomes))
        return self._add(
            metric,
            subject,
            hits / len(outcomes),
            len(outcomes),
            (low, high),
            threat_model,
            condition,
        )

    def flagged(
        self,
        metric: str,
        verdicts: Sequence[Verdict],
        *,
        threat_model: str = "none",
        **condition: Any,
    ) -> Record:
        """The share of images that the guarded model flags; every verdict is kept."""
        self.verdicts += [
            {
                "metric": metric,
                "condition": condition,
                **verdict.to_dict(),
                "codes": list(verdict.codes),
                "scores": list(verdict.scores),
            }
            for verdict in verdicts
        ]
        flags = [verdict.flagged for verdict in verdicts]
        return self.rate(metric, "guarded", flags, threat_model=threat_model, **condition)

    def mean(
        self,
        metric: str,
        subject: str,
        values: Sequence[float],
        *,
        threat_model: str = "none",
        **condition: Any,
    ) -> Record:
        """A mean of shares, each in [0, 1], with its bootstrap interval.

        One share alone says nothing of the mean, and its interval is all of [0, 1].
        """
        alone = len(values) == 1
        low, high = (0.0, 1.0) if alone else bootstrap(list(values), seed=self.seed)
        value = min(max(math.fsum(values) / len(values), low), high)
        return self._add(metric, subject, value, len(values), (low, high), threat_model, condition)

    def median_ratio(
        self, metric: str, subject: str, ratios: Sequence[float], **condition: Any
    ) -> Record:
        """A median of alternated ratios, with its interval; below six ratios there is none."""
        interval = median_interval(list(ratios)) or (None, None)
        value = statistics.median(ratios)
        return self._add(metric, subject, value, len(ratios), interval, "none", condition)

    def value(self, metric: str, subject: str, value: float, n: int, **condition: Any) -> Record:
        """A number without an interval."""
        return self._add(metric, subject, value, n, (None, None), "none", condition)

    def _add(
        self,
        metric: str,
        subject: str,
        value: float,
        n: int,
        interval: tuple[float | None, float | None],
        threat_model: str,
        condition: dict[str, Any],
    ) -> Record:
        record = Record(
            metric=metric,
            subject=subject,
            condition=condition,
            threat_model=threat_model,
            value=value,
            n=n,
            low=interval[0],
            high=interval[1],
            seed=self.seed,
            command=self.command,
            versions=self._versions,
        )
        self.records.append(record)
        return record
