"""Several data sets as one, by weight; and which reader a file needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqguard.errors import DataError
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.records.checked import Checks
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.lazy import LazySamples
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.tables import is_table, read_table
from vqguard.recipes.data.webdataset import read_shards
from vqguard.recipes.recipe import ColumnRecipe, UserPath
from vqguard.strict import StrictConfig, raise_problems
from vqguard.videos import FRAMES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixturePart(StrictConfig):
    """One data set of a mixture."""

    data: UserPath
    """LLaVA JSON, shards or a Hugging Face dataset; relative to the mixture's file."""
    weight: float
    """Its share of the samples, in any unit: shares are weights over their sum."""
    images: UserPath | None = None
    """Folder, zip or tar of the images that are named by path; relative to the mixture's file."""
    columns: ColumnRecipe = field(default_factory=ColumnRecipe)
    """Columns of a Hugging Face dataset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise_problems(type(self), [f"weight: expected more than 0, got {self.weight}"])


@dataclass(frozen=True)
class MixtureFile(StrictConfig):
    """What a mixture's YAML holds."""

    parts: tuple[MixturePart, ...]
    """The data sets."""


class Mixture:
    """Data sets mixed by weight, in a seeded order.

    No sample is used twice: the first set that runs out ends the mixture. Each part's count is
    within one of its share.
    """

    def __init__(self, parts: Sequence[tuple[LlavaData, float]], seed: int = 0) -> None:
        """(data set, weight) pairs; weights above 0."""
        if not parts:
            raise DataError("a mixture needs at least one data set.")
        self.parts = parts
        self.seed = seed

    @property
    def samples(self) -> LazySamples:
        """All samples of all parts, in file order."""
        return LazySamples.joined([LazySamples.of(part.samples) for part, _ in self.parts])

    @property
    def skipped(self) -> list[str]:
        """What was left out of all parts, each with its reason."""
        return [line for part, _ in self.parts for line in part.skipped]

    def captions(self, count: int) -> Sequence[Sample]:
        """Samples with a picture, mixed, at most `count`; parts of texts alone have none."""
        sets = [(part.captions(len(part.samples)), weight) for part, weight in self.parts]
        return self._mixed([(samples, weight) for samples, weight in sets if samples], count)

    def instructions(self, count: int) -> Sequence[Sample]:
        """Samples mixed by weight, at most `count`."""
        sets = [(part.instructions(len(part.samples)), weight) for part, weight in self.parts]
        return self._mixed(sets, count)

    def _mixed(self, sets: Sequence[tuple[Sequence[Sample], float]], count: int) -> LazySamples:
        if not sets:
            return LazySamples.of([])
        sizes = np.array([len(samples) for samples, _ in sets])
        shares = np.array([weight for _, weight in sets], dtype=np.float64)
        shares /= shares.sum()
        # systematic sampling: place k of n goes to the part in whose interval (k + u) / n falls
        total = min(count, *(int(n / share) for n, share in zip(sizes, shares, strict=True)))
        generator = np.random.default_rng(self.seed)
        while True:
            points = (np.arange(total) + generator.random()) / max(total, 1)
            chosen = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
            used = np.bincount(chosen, minlength=len(sets))
            if (used <= sizes).all():
                break
            total -= 1  # rounding asked a part for one more than it has
        chosen = generator.permutation(chosen)
        places = np.empty(total, dtype=np.int64)
        for part, start in enumerate(np.cumsum([0, *sizes[:-1]])):
            places[chosen == part] = start + np.arange(used[part])
        return LazySamples.joined([LazySamples.of(samples) for samples, _ in sets]).chosen(places)


def mixed_in(
    samples: Sequence[Sample], refusals: Sequence[Sample], share: float, seed: int
) -> LazySamples:
    """As many samples as `samples` has, of which a share are refusals, in a seeded order.

    Refusals are used again where there are fewer. What is replaced is the end of `samples`, whose
    own order stays.
    """
    total = len(samples)
    count = round(share * total)
    if count > len(refusals):
        log.info("%d refusals are used for %d samples, again and again", len(refusals), count)
    generator = np.random.default_rng(seed)
    is_refusal = np.zeros(total, np.bool_)
    is_refusal[generator.permutation(total)[:count]] = True
    places = np.empty(total, np.int64)
    places[~is_refusal] = np.arange(total - count)
    places[is_refusal] = total + np.arange(count) % len(refusals)
    return LazySamples.joined([LazySamples.of(samples), LazySamples.of(refusals)]).chosen(places)


def read_data(
    data: Path,
    images: Path | None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    columns: ColumnRecipe | None = None,
    checks: Checks | None = None,
    follow_links: bool = False,
    frames: int = FRAMES,
) -> LlavaData | Mixture:
    """Read a data set by what it is.

    `.yaml` is a mixture; `.parquet`, or a folder that `datasets` saved or that holds
    `.parquet` files, a Hugging Face dataset; any other folder, or `.tar`, shards; else JSON.

    Args:
        data: the file or folder.
        images: root of images that are named by path; shards and mixtures name their own.
        seed: order in which samples are used.
        skip_bad: leave bad samples out and list them.
        columns: of a Hugging Face dataset.
        checks: what samples must pass besides, and what is known of them.
        follow_links: take files outside the images' folders to which links in them lead.
        frames: how many of a video are shown.

    Raises:
        DataError: as the readers do, and for data without a picture or a video.
        ConfigError: a mixture that does not fit its form.
    """
    reading = _Reading(seed, skip_bad, checks or Checks(), follow_links, frames)
    if data.suffix.lower() not in (".yaml", ".yml"):
        samples = reading.part(data, images, columns or ColumnRecipe())
        _require_pictures(data, samples)
        return samples
    _no_images(data, images)
    parts = MixtureFile.from_yaml(data).parts
    if not parts:
        raise DataError(f"{data}: names no data set. Expected parts: [{{data, weight}}, …].")
    read = []
    for number, part in enumerate(parts):
        root = None if part.images is None else data.parent / part.images
        # ids that nobody gave would be the same in every part
        found = reading.part(data.parent / part.data, root, part.columns, f"part {number}: ")
        if not found.samples:
            raise DataError(f"{data.parent / part.data}: has no usable record. Leave it out.")
        read.append((found, part.weight))
    mixture = Mixture(read, seed)
    _require_pictures(data, mixture)
    return mixture


@dataclass
class _Reading:
    """How the parts of one data set are read."""

    seed: int
    skip_bad: bool
    checks: Checks
    follow_links: bool
    frames: int

    def part(
        self, data: Path, images: Path | None, columns: ColumnRecipe, made_up: str = ""
    ) -> LlavaData:
        """One data set that is no mixture."""
        described = images, self.seed, columns.to_dict(), made_up, self.frames
        key = self.checks.key(data, *described, self.skip_bad)
        known = self.checks.known.get(key)
        if known is None and self.checks.finished:
            known = self.checks.known.get(self.checks.key(data, *described, not self.skip_bad))
        settings: dict[str, Any] = {
            "seed": self.seed,
            "skip_bad": self.skip_bad,
            "check": self.checks.check,
            "known": known,
            "made_up": made_up,
        }
        found = self._read(data, images, columns, settings)
        if found.checked is not None:
            self.checks.known[key] = found.checked
        return found

    def _read(
        self, data: Path, images: Path | None, columns: ColumnRecipe, settings: dict[str, Any]
    ) -> LlavaData:
        if data.suffix.lower() in (".yaml", ".yml"):
            raise DataError(f"{data}: a mixture cannot hold another one. List its parts instead.")
        if is_table(data):
            return read_table(data, images, columns, follow_links=self.follow_links, **settings)
        settings["frames"] = self.frames
        shards = data.is_dir() or data.suffix.lower() == ".tar"
        if columns != ColumnRecipe(split=columns.split if shards else None):
            raise DataError(f"{data}: is no Hugging Face dataset, so it has no columns to choose.")
        if shards:
            _no_images(data, images)
            return read_shards(data, split=columns.split, **settings)
        return read_llava(data, images, follow_links=self.follow_links, **settings)


def _require_pictures(data: Path, samples: LlavaData | Mixture) -> None:
    if not LazySamples.of(samples.samples).facts.pictured.any():
        raise DataError(
            f"{data}: no usable record has an image or a video, so there is nothing to quantise."
        )


def _no_images(data: Path, images: Path | None) -> None:
    if images is not None:
        raise DataError(f"{data}: names its images itself. Leave --images out.")
