"""Several data sets as one, by weight; and which reader a file needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vqguard.errors import DataError
from vqguard.recipes.data.llava_json import LlavaData, read_llava
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.tables import is_table, read_table
from vqguard.recipes.data.webdataset import read_shards
from vqguard.recipes.recipe import ColumnRecipe, UserPath
from vqguard.strict import StrictConfig, raise_problems


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
    def samples(self) -> list[Sample]:
        """All samples of all parts, in file order."""
        return [sample for part, _ in self.parts for sample in part.samples]

    @property
    def skipped(self) -> list[str]:
        """What was left out of all parts, each with its reason."""
        return [line for part, _ in self.parts for line in part.skipped]

    def captions(self, count: int) -> Sequence[Sample]:
        """Samples with a picture, mixed, at most `count`."""
        return self._mixed([part.captions(len(part.samples)) for part, _ in self.parts], count)

    def instructions(self, count: int) -> Sequence[Sample]:
        """Samples mixed by weight, at most `count`."""
        return self._mixed([part.instructions(len(part.samples)) for part, _ in self.parts], count)

    def _mixed(self, sets: Sequence[Sequence[Sample]], count: int) -> list[Sample]:
        shares = np.array([weight for _, weight in self.parts], dtype=np.float64)
        shares /= shares.sum()
        # systematic sampling: place k of n goes to the part in whose interval (k + u) / n falls
        total = min(count, *(int(len(s) / share) for s, share in zip(sets, shares, strict=True)))
        generator = np.random.default_rng(self.seed)
        while True:
            points = (np.arange(total) + generator.random()) / max(total, 1)
            chosen = np.searchsorted(np.cumsum(shares)[:-1], points, side="right")
            used = np.bincount(chosen, minlength=len(sets))
            if all(n <= len(s) for n, s in zip(used, sets, strict=True)):
                break
            total -= 1  # rounding asked a part for one more than it has
        rest = [iter(s) for s in sets]
        return [next(rest[part]) for part in generator.permutation(chosen)]


def read_data(
    data: Path,
    images: Path | None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    columns: ColumnRecipe | None = None,
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

    Raises:
        DataError: as the readers do. ConfigError: a mixture that does not fit its form.
    """
    if data.suffix.lower() in (".yaml", ".yml"):
        _no_images(data, images)
        parts = MixtureFile.from_yaml(data).parts
        if not parts:
            raise DataError(f"{data}: names no data set. Expected parts: [{{data, weight}}, …].")
        read = []
        for part in parts:
            root = None if part.images is None else data.parent / part.images
            samples = _one(data.parent / part.data, root, seed, skip_bad, part.columns)
            read.append((samples, part.weight))
        return Mixture(read, seed)
    return _one(data, images, seed, skip_bad, columns or ColumnRecipe())


def _one(
    data: Path, images: Path | None, seed: int, skip_bad: bool, columns: ColumnRecipe
) -> LlavaData:
    if data.suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"{data}: a mixture cannot hold another one. List its parts instead.")
    if is_table(data):
        return read_table(data, images, columns, seed=seed, skip_bad=skip_bad)
    if columns != ColumnRecipe():
        raise DataError(f"{data}: is no Hugging Face dataset, so it has no columns to choose.")
    if data.is_dir() or data.suffix.lower() == ".tar":
        _no_images(data, images)
        return read_shards(data, seed=seed, skip_bad=skip_bad)
    return read_llava(data, images, seed=seed, skip_bad=skip_bad)


def _no_images(data: Path, images: Path | None) -> None:
    if images is not None:
        raise DataError(f"{data}: names its images itself. Leave --images out.")
