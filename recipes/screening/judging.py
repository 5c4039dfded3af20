"""The one way in which files are judged: in batches, whoever reads them and however many do."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from PIL.Image import Image

from vqguard.errors import ConfigError, ImageError
from vqguard.images import Readings, decode_image, decode_readings, open_image, open_readings
from vqguard.recipes.image_batches import batches
from vqguard.recipes.screening.ambiguity import CHOICES, IGNORE, REFUSE
from vqguard.recipes.screening.counts import AMBIGUOUS, FLAGGED, OK, REPORTED, UNREADABLE
from vqguard.safety_map import Verdict

if TYPE_CHECKING:
    from vqguard.recipes.run import LoadedRun

BATCH = 16
"""Files that are judged at a time."""


class PictureFile(Protocol):
    """A file that may hold a picture."""

    @property
    def name(self) -> str:
        """How the verdict calls it."""

    def picture(self) -> Image:
        """As `open_image` gives it. Raises ImageError."""

    def readings(self, converted: bool) -> Readings:
        """As `open_readings` gives them. Raises ImageError."""


@dataclass(frozen=True)
class DiskFile:
    """A file by its path."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def picture(self) -> Image:
        return open_image(self.path)

    def readings(self, converted: bool) -> Readings:
        return open_readings(self.path, converted=converted)


@dataclass(frozen=True)
class ReadFile:
    """A file whose content is known, such as a member of an archive."""

    name: str
    content: bytes

    def picture(self) -> Image:
        return decode_image(io.BytesIO(self.content), self.name)

    def readings(self, converted: bool) -> Readings:
        return decode_readings(io.BytesIO(self.content), self.name, converted=converted)


@dataclass(frozen=True)
class UnusableFile:
    """A file that could not be read."""

    name: str
    error: str

    def picture(self) -> Image:
        raise ImageError(self.error)

    def readings(self, converted: bool) -> Readings:
        raise ImageError(self.error)


@dataclass(frozen=True)
class Judged:
    """What is known of a file.

    That is the verdict on its picture, or on the worst of its readings where all were judged; none
    where it was refused as ambiguous.
    """

    verdict: Verdict | None
    picture: Image
    """The one that the verdict is about; the file's first reading where there is none."""
    ambiguous: str = ""

    @property
    def flagged(self) -> bool:
        """Whether something must be done about it; an ambiguous file is flagged."""
        return self.verdict is None or self.verdict.flagged

    @property
    def word(self) -> str:
        """`ok`, `flagged`, `ambiguous` or `reported`.

        The last: a threshold was exceeded, and the policy is to report that.
        """
        if self.verdict is None:
            return AMBIGUOUS
        if self.verdict.flagged:
            return FLAGGED
        return OK if self.verdict.reason is None else REPORTED

    def to_row(self) -> dict[str, Any]:
        """What is written down of it, as plain values ready for JSON."""
        verdict = self.verdict
        if verdict is None:
            return {"verdict": self.word, "reason": self.ambiguous}
        row: dict[str, Any] = {
            "verdict": self.word,
            "category": verdict.category,
            "probability": verdict.probability,
            "semantic_code": verdict.semantic_code,
        }
        if not verdict.quantised:
            row["quantised"] = False  # a judge alone: what passes is not bounded by a codebook
        if verdict.reason is not None:
            row["reason"] = dataclasses.asdict(verdict.reason)
        return {**row, "ambiguous": self.ambiguous} if self.ambiguous else row


def word_of(result: Judged | ImageError) -> str:
    """`Judged.word`, or `unreadable`: an error must not pass for a file that is let through."""
    return UNREADABLE if isinstance(result, ImageError) else result.word


File = TypeVar("File", bound=PictureFile)


class PictureJudge(Generic[File]):
    """Judges files by a run's guard; the language model does not run.

    Args:
        run: as `open_run` opens it.
        ambiguous: what is done about a file that shows several pictures: one of `CHOICES`.

    Raises:
        ConfigError: another word.
    """

    def __init__(self, run: LoadedRun, ambiguous: str = REFUSE) -> None:
        if ambiguous not in CHOICES:
            raise ConfigError(f"ambiguous: expected {', '.join(CHOICES)}, got {ambiguous!r}")
        self.run = run
        self.ambiguous = ambiguous

    def __call__(self, files: Iterable[File]) -> Iterator[tuple[File, Judged | ImageError]]:
        """What is found of each file, in the order given: an error where there is no verdict."""
        each = ((file, self._open(file)) for file in files)
        for opened in batches(each, lambda item: _pixels(item[1]), BATCH):
            yield from self._judged(opened)

    def _judged(
        self, opened: Sequence[tuple[File, Readings | ImageError]]
    ) -> Iterator[tuple[File, Judged | ImageError]]:
        pictures = [
            picture
            for _, readings in opened
            if not isinstance(readings, ImageError) and not self._refuses(readings)
            for picture in _pictures(readings)
        ]
        verdicts = iter(self._screen(pictures))
        for file, readings in opened:
            if isinstance(readings, ImageError):
                yield file, readings
            elif self._refuses(readings):
                yield file, Judged(None, readings.picture, readings.ambiguous)
            else:
                mine = list(islice(verdicts, 1 + len(readings.others)))
                verdict, picture = _worst(zip(mine, _pictures(readings), strict=True))
                yield file, Judged(verdict, picture, readings.ambiguous)

    def _open(self, file: PictureFile) -> Readings | ImageError:
        try:
            if self.ambiguous == IGNORE:
                return Readings(file.picture())
            return file.readings(self.run.converts_to_rgb)
        except ImageError as error:
            return error

    def _refuses(self, readings: Readings) -> bool:
        return self.ambiguous == REFUSE and bool(readings.others)

    def _screen(self, pictures: Sequence[Image]) -> list[Verdict]:
        """One verdict a picture, or an error: a missing verdict never passes for one."""
        verdicts: list[Verdict] = []
        for start in range(0, len(pictures), BATCH):
            part = list(pictures[start : start + BATCH])
            screened = zip(self.run.screen_images(part), part, strict=True)
            verdicts += (verdict for verdict, _ in screened)
        return verdicts


def _pixels(readings: Readings | ImageError) -> int:
    if isinstance(readings, ImageError):
        return 0
    return sum(picture.width * picture.height for picture in _pictures(readings))


def _pictures(readings: Readings) -> list[Image]:
    return [readings.picture, *(picture for _, picture in readings.others)]


def _worst(judged: Iterable[tuple[Verdict, Image]]) -> tuple[Verdict, Image]:
    """The worst verdict, with its picture.

    That is the first flagged one with the highest probability, else the first reported one, else
    the first of all.
    """

    def badness(pair: tuple[Verdict, Image]) -> tuple[bool, bool, float]:
        verdict, _ = pair
        return (
            verdict.flagged,
            verdict.reason is not None,
            verdict.probability if verdict.flagged else 0.0,
        )

    return max(judged, key=badness)
