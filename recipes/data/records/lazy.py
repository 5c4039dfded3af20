"""Samples that are made when they are asked for, from what was found out about them before.

Of a record this keeps 18 bytes: its number in the data, a hash of its id, and whether it has a
picture or a video. So a data set of millions is chosen from, ordered and mixed without its texts in
memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from vqguard.recipes.data.samples import Sample


@dataclass(frozen=True)
class Facts:
    """What is known of each of n records: arrays of length n."""

    numbers: NDArray[np.int64]
    """Which record of the data it is."""
    names: NDArray[np.uint64]
    """The hash of its id."""
    pictured: NDArray[np.bool_]
    """Whether it has a picture or a video."""
    filmed: NDArray[np.bool_]
    """Whether it has a video."""

    @classmethod
    def of(cls, samples: Iterable[tuple[int, Sample]]) -> Facts:
        """Of (number, sample) pairs, which are looked at once."""
        kind = np.dtype(
            [
                ("numbers", np.int64),
                ("names", np.uint64),
                ("pictured", np.bool_),
                ("filmed", np.bool_),
            ]
        )
        rows = np.fromiter(
            (
                (
                    number,
                    name_hash(sample.id),
                    bool(sample.images or sample.videos),
                    bool(sample.videos),
                )
                for number, sample in samples
            ),
            dtype=kind,
        )
        return cls(*(np.ascontiguousarray(rows[field]) for field in kind.names or ()))

    @classmethod
    def joined(cls, parts: Sequence[Facts]) -> Facts:
        """One behind the other; numbers count all records of the parts before."""
        offsets = np.cumsum([0, *(len(part.numbers) for part in parts)])
        return cls(
            np.arange(offsets[-1], dtype=np.int64),
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.pictured for part in parts]),
            np.concatenate([part.filmed for part in parts]),
        )

    def chosen(self, places: NDArray[Any]) -> Facts:
        """Those at `places` (indices, or a mask), in this order."""
        return Facts(*(column[places] for column in vars(self).values()))


class LazySamples(Sequence[Sample]):
    """A sequence that calls `make` with a record's number each time that a sample is asked for."""

    def __init__(self, make: Callable[[int], Sample], facts: Facts) -> None:
        self._make = make
        self.facts = facts

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> LazySamples:
        """Of any sequence; a lazy one as it is."""
        if isinstance(samples, LazySamples):
            return samples
        return cls(samples.__getitem__, Facts.of(enumerate(samples)))

    @classmethod
    def joined(cls, parts: Sequence[LazySamples]) -> LazySamples:
        """One sequence behind the other."""
        return cls(_Joined(parts), Facts.joined([part.facts for part in parts]))

    def __len__(self) -> int:
        return len(self.facts.numbers)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> LazySamples: ...
    def __getitem__(self, place: int | slice) -> Sample | LazySamples:
        if isinstance(place, slice):
            return self.chosen(np.arange(len(self))[place])
        return self._make(int(self.facts.numbers[place]))

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, map(int, self.facts.numbers))

    def chosen(self, places: NDArray[Any]) -> LazySamples:
        """The samples at `places` (indices, or a mask), in this order."""
        return LazySamples(self._make, self.facts.chosen(places))

    def with_pictures(self) -> LazySamples:
        """Those that have a picture or a video."""
        return self.chosen(self.facts.pictured)

    def where(self, wanted: Callable[[Sample], bool]) -> LazySamples:
        """Those that are wanted; each is made once for it."""
        return self.chosen(np.fromiter((wanted(sample) for sample in self), np.bool_, len(self)))

    def without(self, others: LazySamples) -> LazySamples:
        """Those whose ids are not among the others'."""
        return self.chosen(~np.isin(self.facts.names, others.facts.names))

    def shuffled(self, seed: int) -> LazySamples:
        """In the order of a seed."""
        return self.chosen(np.random.default_rng(seed).permutation(len(self)))


def pictured(
    samples: Sequence[Sample],
    same: Callable[[Sample, Sample], bool],
    clash: Callable[[str], Exception],
) -> LazySamples:
    """Samples with a picture or a video, each id once; what is kept by id needs this.

    `same`: whether two samples of one id are one. Raises what `clash` makes of an id where they are
    not.
    """
    lazy = LazySamples.of(samples).with_pictures()
    places: dict[str, int] = {}
    for place, sample in enumerate(lazy):
        first = places.setdefault(sample.id, place)
        if first != place and not same(lazy[first], sample):
            raise clash(sample.id)
    return lazy.chosen(np.fromiter(places.values(), np.int64, len(places)))


class _Joined:
    """Makes samples of several sequences by their number in all of them."""

    def __init__(self, parts: Sequence[LazySamples]) -> None:
        self._parts = parts
        self._offsets = np.cumsum([0, *map(len, parts)])

    def __call__(self, number: int) -> Sample:
        part = int(np.searchsorted(self._offsets, number, side="right")) - 1
        return self._parts[part][number - int(self._offsets[part])]


def name_hash(name: str) -> int:
    """64 bits of a sample's id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
