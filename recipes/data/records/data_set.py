"""A data set whose records were all looked at once, and are made anew when they are asked for.

Every record is checked before training starts, so a bad one is found in the first minutes and not
in the third hour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vqguard.errors import ConfigError, DataError, InputError
from vqguard.recipes.console.progress import watched
from vqguard.recipes.data.records.checked import Checked, CheckSample
from vqguard.recipes.data.records.lazy import Facts, LazySamples
from vqguard.recipes.data.records.unread import log_unread
from vqguard.recipes.data.samples import Sample

_MOST_BAD = 20
"""Bad records that are looked for before data are refused."""


class Records(Protocol):
    """The records of a data set, as one format has them."""

    unread: Counter[str]
    """What is counted as not read."""
    places: NDArray[np.int64]
    """What `sample` goes by, if it needs more than a number; a pass sets it."""

    def __len__(self) -> int:
        """How many there are; 0 where that is not known before they are read."""

    def checked(self, decode: bool) -> Iterator[Callable[[], Sample]]:
        """One pass: each makes a sample, or raises what is wrong with it.

        Args:
            decode: look at each picture to its last byte.
        """

    def sample(self, number: int) -> Sample:
        """The sample of this number in a pass, without another look."""


@dataclass
class LlavaData:
    """Samples of one LLaVA-format file, of shards, or of a dataset on disk.

    `skipped` lists what `skip_bad` left out, each with its reason.
    """

    samples: Sequence[Sample]
    seed: int
    skipped: list[str] = field(default_factory=list)
    checked: Checked | None = None
    """What another run on the same data need not find out again."""

    @classmethod
    def collect(
        cls,
        data: Path,
        records: Records,
        *,
        seed: int,
        skip_bad: bool,
        check: CheckSample | None = None,
        known: Checked | None = None,
    ) -> LlavaData:
        """Check the records of `data` one by one.

        Args:
            data: where they are.
            records: what is there.
            seed: order in which samples are used.
            skip_bad: leave bad ones out and list them, instead of refusing the data.
            check: what each sample must pass besides.
            known: what an earlier pass found out; then none is made.

        Raises:
            DataError: bad ones.
        """
        if known is None:
            known = _checked(data, records, skip_bad, check)
        records.places = known.places
        return cls(LazySamples(records.sample, known.facts), seed, known.skipped, known)

    def captions(self, count: int) -> Sequence[Sample]:
        """Samples with a picture, in a seeded order, at most `count`."""
        return LazySamples.of(self.samples).with_pictures().shuffled(self.seed)[:count]

    def instructions(self, count: int) -> Sequence[Sample]:
        """All samples in a seeded order, at most `count`."""
        return LazySamples.of(self.samples).shuffled(self.seed)[:count]


def _checked(data: Path, records: Records, skip_bad: bool, check: CheckSample | None) -> Checked:
    """One pass over all records."""
    bad: list[str] = []

    def good() -> Iterator[tuple[int, Sample]]:
        makers = watched(records.checked(skip_bad), len(records) or None, f"checking {data.name}")
        for number, make in enumerate(makers):
            try:
                sample = make()
                if check is not None:
                    check(sample)
            except (InputError, ConfigError) as error:
                bad.append(str(error))
                if not skip_bad and len(bad) == _MOST_BAD:
                    return
            else:
                yield number, sample

    facts = Facts.of(good())
    if bad and not skip_bad:
        raise DataError(f"{bad[0]} With --skip-bad the run goes on without it.{_others(bad)}")
    log_unread(data, records.unread)
    return Checked(facts, bad, records.places)


def _others(bad: list[str]) -> str:
    if len(bad) == 1:
        return ""
    found = len(bad) - 1
    said = "no more were looked for" if len(bad) == _MOST_BAD else "all others fit"
    return "".join([f"\n{found} more do not fit ({said}):", *(f"\n  {line}" for line in bad[1:])])
