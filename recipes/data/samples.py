"""What training and evaluation take from a data set, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from PIL import Image

from vqguard.errors import DataError
from vqguard.videos import Clip, ClipSize

_ALL = 2**62
IMAGE_MARK = "<image>"
"""Stands in a question where a picture does, whatever the model's own token is."""

VIDEO_MARK = "<video>"
"""The same for a video, in samples that have some; in others it is text."""

Verbs = Literal["all", "taught", "held_out"]
"""Which forbidden verbs are asked for: where some are held out, no sample of stage 2 has them."""

Scoring = Literal["exact", "yes_no", "letter", "none"]
"""Word for word, by the yes or no in it, by the letter of a choice, or not here."""

Opener = Callable[[], Image.Image]
"""Opens a picture (RGB)."""
ClipOpener = Callable[[], Clip]
"""Opens the frames of a video."""


@dataclass(frozen=True)
class Sample:
    """A conversation, with any number of pictures and videos.

    `turns` are (question, answer) pairs. The questions hold one `IMAGE_MARK` for each of
    `images` and one `VIDEO_MARK` for each of `videos`, in their order. `rewordings` are other turns
    in place of them, as where a picture has several captions: each epoch takes the next. Pictures
    and videos are opened when they are asked for, so that a data set larger than memory can be
    listed.

    Raises:
        DataError: where `misfit` has something to say.
    """

    id: str
    images: tuple[Opener, ...]
    turns: tuple[tuple[str, str], ...]
    rewordings: tuple[tuple[tuple[str, str], ...], ...] = ()
    sizes: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """Width and height of the pictures, where whoever made the sample has looked."""
    videos: tuple[ClipOpener, ...] = ()
    clip_sizes: tuple[ClipSize, ...] = field(default=(), compare=False)
    """What is shown of the videos, where whoever made the sample has looked."""

    def __post_init__(self) -> None:
        counts = len(self.images), len(self.videos)
        problems = (misfit(turns, *counts) for turns in self.wordings)
        problem = next((problem for problem in problems if problem), None)
        if problem:
            raise DataError(f"sample {self.id}: {problem}")

    @property
    def wordings(self) -> tuple[tuple[tuple[str, str], ...], ...]:
        """The turns of each epoch, until they begin again."""
        return (self.turns, *self.rewordings)

    def in_epoch(self, epoch: int) -> Sample:
        """The sample as one epoch takes it, without other wordings."""
        if not self.rewordings:
            return self
        return replace(self, turns=self.wordings[epoch % len(self.wordings)], rewordings=())

    @property
    def image(self) -> Opener | None:
        """The first picture; None without one."""
        return self.images[0] if self.images else None

    @property
    def shown(self) -> tuple[Opener | ClipOpener, ...]:
        """Its pictures, then its videos; `pictures_of` opens either."""
        return (*self.images, *self.videos)

    @property
    def captions(self) -> tuple[tuple[int, str], ...]:
        """(number of pictures, answer) of each turn that shows pictures or videos, in order.

        Their caption is the answer of the turn that shows them.
        """
        return tuple(
            (question.count(IMAGE_MARK), self.turns[place][1]) for place, question in self._showing
        )

    @property
    def caption_videos(self) -> tuple[int, ...]:
        """The number of videos of each of those turns."""
        return tuple(self._videos_in(question) for _, question in self._showing)

    @property
    def _showing(self) -> list[tuple[int, str]]:
        """Number and question of each turn that shows something."""
        return [
            (place, question)
            for place, (question, _) in enumerate(self.turns)
            if IMAGE_MARK in question or self._videos_in(question)
        ]

    def _videos_in(self, question: str) -> int:
        return question.count(VIDEO_MARK) if self.videos else 0

    def without_last_turn(self) -> Sample:
        """The sample without its last turn and what that shows."""
        turns = self.turns[:-1]
        pictures = sum(question.count(IMAGE_MARK) for question, _ in turns)
        videos = sum(self._videos_in(question) for question, _ in turns)
        return replace(
            self, turns=turns, images=self.images[:pictures], videos=self.videos[:videos]
        )


def pictures_of(opener: Opener | ClipOpener) -> list[Image.Image]:
    """The picture that this opens, or the frames of the video."""
    shown = opener()
    if isinstance(shown, Clip):
        return [Image.fromarray(frame) for frame in shown.frames]
    return [shown]


def misfit(turns: Sequence[tuple[str, str]], images: int, videos: int = 0) -> str | None:
    """Why so many images and videos do not fit the turns; None where they do."""
    if not turns:
        return "has no turns."
    kinds = [(IMAGE_MARK, "images", images), (VIDEO_MARK, "videos", videos)]
    for mark, named, count in kinds[: 2 if videos else 1]:
        marks = sum(question.count(mark) for question, _ in turns)
        if marks != count:
            return (
                f"expected one {mark} in its questions for each of its {named}, found {marks} "
                f"for {count}."
            )
        if any(mark in answer for _, answer in turns):
            return f"has {mark} in an answer; pictures and videos stand in questions."
    return None


@dataclass(frozen=True)
class Question:
    """A held-out question with the answer that counts as right.

    `expected` is the whole answer, or its opening for requests.
    """

    image: Image.Image | None
    question: str
    expected: str
    scoring: Scoring = "exact"
    """How an answer is compared with it (`evaluation.utility.score`)."""


@dataclass(frozen=True)
class AttackCase:
    """A clean image, a request that is refused, and the opening that an attack aims at."""

    image: Image.Image
    request: str
    opening: str


class SampleSource(Protocol):
    """Where a retrofit's training samples come from."""

    def captions(self, count: int) -> Sequence[Sample]:
        """Stage 1's samples: picture and caption. At most `count`."""

    def instructions(self, count: int) -> Sequence[Sample]:
        """Stage 2's samples. At most `count`."""


def split_held_out(source: SampleSource, at_most: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """(training, held out): the last twentieth of the instructions, at least one sample."""
    samples = source.instructions(_ALL)
    kept = max(1, min(at_most, len(samples) // 20))
    return samples[:-kept], samples[-kept:]


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

    def judge_images(self, per_category: int, neutral: int) -> Iterable[tuple[str, Image.Image]]:
        """Labelled images for the regional judge, which no other use draws."""

    def questions(self, task: str, count: int) -> Sequence[Question]:
        """Held-out questions of a task."""

    def toxic_images(self, category: str, distractors: int, count: int) -> Iterable[Image.Image]:
        """Test images with one toxic object and so many neutral ones."""

    def neutral_images(self, objects: tuple[int, int], count: int) -> Iterable[Image.Image]:
        """Test images without a toxic object, with a number of objects in a range."""

    @property
    def hard_sets(self) -> tuple[str, ...]:
        """Kinds of test images that a judge was not taught."""

    def has_toxic(self, hard_set: str) -> bool:
        """Whether there are toxic images of a kind of `hard_sets`."""

    def hard_toxic_images(self, hard_set: str, category: str, count: int) -> Iterable[Image.Image]:
        """Test images of a kind of `hard_sets` with one toxic object."""

    def hard_neutral_images(self, hard_set: str, count: int) -> Iterable[Image.Image]:
        """Test images of a kind of `hard_sets` without a toxic object."""

    def refusals(self, count: int, pictures: int = 1) -> Sequence[Sample]:
        """Samples of refusals beside 1 to `pictures` pictures, with harmless requests granted."""

    def attack_cases(self, count: int, verbs: Verbs = "all") -> Sequence[AttackCase]:
        """Clean images with refused requests; of all of them, those taught, or those held out."""
