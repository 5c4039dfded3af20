"""Small copies of calibration images in a run's directory: those nearest to each code.

They are kept only where somebody asks for it, since whoever has the run then has the pictures. They
belong to the counts of one map: with another calibration they are not shown, a changed threshold or
policy keeps them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from vqguard.codebooks.guard_output import Judged
from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import replace_files, replace_text
from vqguard.safety_map import SafetyMap
from vqguard.strict import StrictData
from vqguard.text_files import read_json

EXAMPLES = "examples"
"""The folder, in a run's directory."""
INDEX = "examples.json"
EACH = 4
"""Copies of a code, at most."""
_SIDE, _QUALITY = 128, 90  # pixels of a copy's longer side; JPEG's

Labels = tuple[str, ...]


@dataclass(frozen=True)
class _Index(StrictData):
    schema: Literal[1]
    counts_sha256: str
    codes: Mapping[str, tuple[Labels, ...]]
    """Code, in decimal -> the labels of each of its copies."""


@dataclass(frozen=True)
class Example:
    """A calibration image that one of its regions, or the whole, gives a code."""

    path: Path
    labels: Labels


@dataclass(frozen=True)
class Examples:
    """The copies of a run that belong to its map."""

    folder: Path
    labels: Mapping[int, tuple[Labels, ...]]

    def of(self, code: int) -> list[Example]:
        """The images nearest to a code, the nearest first; none where none was counted in it."""
        return [
            Example(self.folder / _name(code, place), labels)
            for place, labels in enumerate(self.labels.get(code, ()))
        ]


class ExampleKeeper:
    """Copies images as they pass, and writes those that turn out nearest to a code."""

    def __init__(self) -> None:
        self._copies: list[bytes] = []
        self._chosen: dict[int, list[int]] = {}
        self._labels: dict[int, Labels] = {}

    def see(self, images: Iterable[Image.Image]) -> None:
        """Copy the next images."""
        self._copies += [_small_copy(image) for image in images]

    def choose(
        self, judged: Judged, labels: Sequence[Labels], numbers: Sequence[int] | None = None
    ) -> None:
        """Find the images nearest to each code.

        Args:
            judged: of the images that are counted.
            labels: theirs.
            numbers: their places among all that were seen; None: they are all.
        """
        places = range(len(labels)) if numbers is None else numbers
        nearest = nearest_images(judged)
        self._chosen = {code: [places[n] for n in rows] for code, rows in nearest.items()}
        self._labels = {place: tuple(names) for place, names in zip(places, labels, strict=True)}

    def write(self, run: Path, safety_map: SafetyMap) -> None:
        """Put the copies into a run's directory, in the place of an earlier map's.

        Raises:
            OSError: they cannot be written; then none are there.
        """
        forget_examples(run)
        folder = run / EXAMPLES
        folder.mkdir()
        replace_files(
            {
                folder / _name(code, place): self._copies[number]
                for code, numbers in self._chosen.items()
                for place, number in enumerate(numbers)
            }
        )
        codes = {
            str(code): tuple(self._labels[number] for number in numbers)
            for code, numbers in sorted(self._chosen.items())
        }
        index = _Index(1, _counts_sha256(safety_map), codes)
        replace_text(folder / INDEX, json.dumps(index.to_dict(), indent=1) + "\n")


def forget_examples(run: Path) -> None:
    """Remove the copies of a run, if there are any."""
    shutil.rmtree(run / EXAMPLES, ignore_errors=True)


def read_examples(run: Path, safety_map: SafetyMap) -> Examples | None:
    """The copies of a run that belong to this map; None where none do.

    Raises:
        ArtefactError: what is there was not written by `ExampleKeeper`.
    """
    path = run / EXAMPLES / INDEX
    if not path.is_file():
        return None
    try:
        index = _Index.from_dict(read_json(path, ArtefactError))
        labels = {int(code): names for code, names in index.codes.items()}
    except (ConfigError, ValueError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}): remove {path.parent}, or calibrate again"
        ) from error
    if index.counts_sha256 != _counts_sha256(safety_map):
        return None
    return Examples(path.parent, {code: names[:EACH] for code, names in labels.items()})


def nearest_images(judged: Judged) -> dict[int, list[int]]:
    """By code the rows of the images nearest to it, the nearest first, at most `EACH`.

    An image is as near as the nearest of its tokens that have the code.
    """
    codes, mask, distances = judged.codes, judged.mask, judged.distances
    real = codes >= 0 if mask is None else mask
    far = torch.zeros(codes.shape, dtype=torch.float64) if distances is None else distances
    nearest: dict[int, list[int]] = {}
    for row, code in _by_distance(codes, real, far):
        rows = nearest.setdefault(code, [])
        if len(rows) < EACH and row not in rows:
            rows.append(row)
    return nearest


def _by_distance(codes: Tensor, real: Tensor, far: Tensor) -> Iterable[tuple[int, int]]:
    """(row, code) of every real token, the nearest to its codeword first."""
    rows = torch.arange(len(codes))[:, None].expand_as(codes)[real]
    order = far[real].double().argsort(stable=True)
    return zip(rows[order].tolist(), codes[real][order].tolist(), strict=True)


def _name(code: int, place: int) -> str:
    return f"{code:05d}-{place}.jpg"


def _small_copy(image: Image.Image) -> bytes:
    """A JPEG without metadata."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    copy = Image.new("RGB", small.size)
    copy.paste(small)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _counts_sha256(safety_map: SafetyMap) -> str:
    """Of what was counted, and with which codewords."""
    plain = [safety_map.codebook_checksum, list(safety_map.categories), safety_map.counts.tolist()]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
