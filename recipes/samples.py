"""What training and evaluation take from a data set, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """A conversation, with or without a picture.

    ``turns`` are (question, answer) pairs; the picture, if any, stands before the first question.
    ``image`` opens it (RGB), so that a data set larger than memory can be listed.
    """

    id: str
    image: Callable[[], Image.Image] | None
    turns: tuple[tuple[str, str], ...]

    @property
    def caption(self) -> str:
        """The text whose hidden state is H_caption: the first answer."""
        return self.turns[0][1]


@dataclass(frozen=True)
class Question:
    """A held-out question with the answer that counts as right.

    ``expected`` is the whole answer, or its opening for requests.
    """

    image: Image.Image | None
    question: str
    expected: str


@dataclass(frozen=True)
class AttackCase:
    """A clean image, a request that is refused, and the opening that an attack aims at."""

    image: Image.Image
    request: str
    opening: str


class SampleSource(Protocol):
    """Where a retrofit's training samples come from."""

    def captions(self, count: int) -> Sequence[Sample]:
        """Stage 1's samples: picture and caption. At most ``count``."""

    def instructions(self, count: int) -> Sequence[Sample]:
        """Stage 2's samples. At most ``count``."""


class World(SampleSource, Protocol):
    """A source that also knows what is true, toxic and forbidden in it: all can be measured."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The toxic categories."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """Utility tasks, named as their metrics."""

    @property
    def refusal(self) -> str:
        """How the language model's own refusals begin."""

    def calibration(self, per_category: int, neutral: int) -> Iterable[tuple[str, Image.Image]]:
        """Labelled images for the safety map."""

    def questions(self, task: str, count: int) -> Sequence[Question]:
        """Held-out questions of a task."""

    def toxic_images(self, category: str, distractors: int, count: int) -> Iterable[Image.Image]:
        """Test images with one toxic object and so many neutral ones."""

    def neutral_images(self, objects: tuple[int, int], count: int) -> Iterable[Image.Image]:
        """Test images without a toxic object, with a number of objects in a range."""

    def attack_cases(self, count: int) -> Sequence[AttackCase]:
        """Clean images with refused requests."""
