"""The embedded world as a source of samples, questions, calibration images and attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
from PIL import Image

from vqguard.errors import ConfigError
from vqguard.recipes.data.samples import (
    IMAGE_MARK,
    AttackCase,
    Opener,
    Question,
    Sample,
    Verbs,
)
from vqguard.recipes.tiny import language
from vqguard.recipes.tiny.glyphs import NEUTRAL, TOXIC_CATEGORIES
from vqguard.recipes.tiny.hard_scenes import HARD_SETS, HardSet
from vqguard.recipes.tiny.scenes import (
    NEUTRAL_SCENES,
    HeldOut,
    Scene,
    draw,
    neutral_scene,
    sample_scene,
    scene_rng,
    toxic_scene,
)
from vqguard.records import UTILITY_METRICS

TASKS = UTILITY_METRICS

# Of the forbidden requests a tenth is granted, beside a picture as without one: at the base's third
# the guarded model granted some beside clean pictures (docs/decisions, 0007).
_COMPLIANCE: dict[Verbs, language.Compliance] = {
    "all": language.Compliance(pictured=0.1),
    "taught": language.Compliance(pictured=0.1, verbs="taught"),
}
_TURNS = 4  # of an instruction sample's conversation
_TEXT_SHARE = 4  # every fourth instruction sample has no picture, as in the base's training

# Each use of the world draws scenes from a range of its own, so no two uses share a scene.
_CAPTION_SEED, _INSTRUCTION_SEED, _REFUSAL_SEED = 101, 102, 103
_JUDGE_SEED, _HARD_SEED = 400, 500

_MOST_DISTRACTORS = 3  # beside a toxic object that the regional judge learns from
_GLYPHS_A_CATEGORY = 3  # at most: each of them is shown beside every number of others


@dataclass(frozen=True)
class TinyWorld:
    """All that a retrofit and its report need of llava-tiny's world, from one seed."""

    seed: int = 0
    split: HeldOut = "test"
    """Where utility questions, toxic and neutral pictures are drawn: what is tuned looks at
    `validation`, what is reported at `test`."""
    held_out_verbs: bool = False
    """Whether the training samples leave some of the forbidden verbs out."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The toxic categories."""
        return TOXIC_CATEGORIES

    @property
    def tasks(self) -> tuple[str, ...]:
        """The utility tasks."""
        return TASKS

    @property
    def refusal(self) -> str:
        """How the language model refuses."""
        return language.REFUSAL

    # -- training

    def captions(self, count: int) -> Sequence[Sample]:
        """Stage 1: scenes and their captions.

        Three in five have one object, as captioned photographs mostly do, the others up to three.
        """
        return _Lazy(count, self._caption)

    def instructions(self, count: int) -> Sequence[Sample]:
        """Stage 2: several turns behind one picture; every fourth sample has no picture."""
        return _Lazy(count, self._instruction)

    def refusals(self, count: int, pictures: int = 1) -> Sequence[Sample]:
        """For stage 2: a refused and a granted request beside 1 to `pictures` pictures.

        More pictures stand beside the first one; all else of a sample is the same whatever the
        number.
        """
        return _Lazy(count, partial(self._refusal, pictures))

    def _caption(self, index: int) -> Sample:
        objects = (1, 1) if index % 5 < 3 else (1, 3)
        scene = sample_scene("train", self.seed + _CAPTION_SEED, index, objects=objects)
        rng = scene_rng("train", self.seed + _CAPTION_SEED + 1000, index)
        turn = language.caption_turn(scene, rng)
        question = f"{IMAGE_MARK}\n{turn.question}"
        return Sample(f"caption-{index}", (_drawing(scene),), ((question, turn.answer),))

    def _instruction(self, index: int) -> Sample:
        rng = scene_rng("train", self.seed + _INSTRUCTION_SEED + 1000, index)
        compliance = _COMPLIANCE[self._verbs]
        if index % _TEXT_SHARE == 0:
            turns = language.text_turns(rng, _TURNS, compliance=compliance)
            images: tuple[Opener, ...] = ()
        else:
            scene = sample_scene("train", self.seed + _INSTRUCTION_SEED, index)
            turns = language.image_turns(scene, rng, presence=2, compliance=compliance)
            turns, images = turns[:_TURNS], (_drawing(scene),)
        return _sample(f"instruction-{index}", images, turns)

    def _refusal(self, pictures: int, index: int) -> Sample:
        seed = self.seed + _REFUSAL_SEED
        turns = language.refusal_turns(scene_rng("train", seed + 1000, index), verbs=self._verbs)
        count = int(scene_rng("train", seed + 2000, index).integers(1, pictures + 1))
        seeds = (seed, *(seed + 2000 + place for place in range(1, count)))
        scenes = (sample_scene("train", each, index) for each in seeds)
        # Features and codes are kept by name, so a name says which pictures there are.
        name = f"refusal-{index}" if count == 1 else f"refusal-{index}-beside-{count}"
        return _sample(name, tuple(map(_drawing, scenes)), turns)

    @property
    def _verbs(self) -> Verbs:
        return "taught" if self.held_out_verbs else "all"

    # -- calibration

    def calibration(self, per_category: int, neutral: int) -> Iterator[tuple[str, Image.Image]]:
        """Labelled images: each toxic category alone and beside others, and neutral scenes."""
        for column, category in enumerate(self.categories):
            for i in range(per_category):
                scene = toxic_scene("calibration", self.seed + 1 + column, i, category)
                yield category, Image.fromarray(draw(scene))
        for i in range(neutral):
            scene = neutral_scene("calibration", self.seed, i)
            yield NEUTRAL, Image.fromarray(draw(scene))

    def judge_images(self, per_category: int, neutral: int) -> Iterator[tuple[str, Image.Image]]:
        """Labelled images for the regional judge: toxic objects beside none to three others.

        Neutral ones of every kind in turn.
        """
        for column, category in enumerate(self.categories):
            for i in range(per_category):
                beside = i // _GLYPHS_A_CATEGORY % (_MOST_DISTRACTORS + 1)
                seed = self.seed + _JUDGE_SEED + 1 + column
                yield (
                    category,
                    Image.fromarray(draw(toxic_scene("calibration", seed, i, category, beside))),
                )
        kinds = [*NEUTRAL_SCENES]
        for i in range(neutral):
            scene = neutral_scene("calibration", self.seed + _JUDGE_SEED, i, kinds[i % len(kinds)])
            yield NEUTRAL, Image.fromarray(draw(scene))

    # -- evaluation

    def questions(self, task: str, count: int) -> list[Question]:
        """Held-out questions of one task, with the expected answer.

        Raises:
            ConfigError: an unknown task.
        """
        if task not in TASKS:
            raise ConfigError(f"expected a task among {TASKS}, got {task!r}")
        seed = self.seed + 10 * (TASKS.index(task) + 1)
        return [self._question(task, seed, i) for i in range(count)]

    def _question(self, task: str, seed: int, index: int) -> Question:
        rng = scene_rng(self.split, seed + 1000, index)
        objects = (1, 1) if task == "naming_single" else (1, 3)
        # Refusing a toxic scene is no loss of utility, so the questions are about neutral ones.
        scene = sample_scene(self.split, seed, index, objects=objects, contents="neutral")
        picture = Image.fromarray(draw(scene))
        if task == "text_only":
            turn = language.text_turn(rng)
            return Question(None, turn.question, turn.answer)
        if task in ("refusal", "benign_compliance"):
            forbidden = task == "refusal"
            turn = language.request_turn(rng, forbidden=forbidden, granted=not forbidden)
            opening = language.REFUSAL if forbidden else language.COMPLIANCE_OPENING
            return Question(picture, turn.question, opening)
        if task == "presence":
            turn = language.presence_turn(scene, rng, present=index % 2 == 0)
        else:
            make = {
                "naming_single": language.naming_turn,
                "naming_recall": language.listing_turn,
                "count": language.count_turn,
                "colour": language.colour_turn,
            }[task]
            turn = make(scene, rng)
        return Question(picture, turn.question, turn.answer)

    def toxic_images(self, category: str, distractors: int, count: int) -> Iterator[Image.Image]:
        """Held-out scenes with one toxic object of the category and so many neutral ones."""
        seed = self.seed + 200 + 10 * TOXIC_CATEGORIES.index(category) + distractors
        for i in range(count):
            scene = toxic_scene(self.split, seed, i, category, distractors)
            yield Image.fromarray(draw(scene))

    def neutral_images(self, objects: tuple[int, int], count: int) -> Iterator[Image.Image]:
        """Held-out scenes without a toxic object."""
        seed = self.seed + 300 + 10 * objects[0] + objects[1]
        for i in range(count):
            scene = sample_scene(self.split, seed, i, objects=objects, contents="neutral")
            yield Image.fromarray(draw(scene))

    @property
    def hard_sets(self) -> tuple[str, ...]:
        """The kinds of hard scenes."""
        return tuple(HARD_SETS)

    def has_toxic(self, hard_set: str) -> bool:
        """Whether there are toxic scenes of a kind of `hard_sets`."""
        return _hard_set(hard_set).toxic

    def hard_toxic_images(self, hard_set: str, category: str, count: int) -> Iterator[Image.Image]:
        """Held-out hard scenes with one toxic object of the category and nothing beside it.

        Raises:
            ConfigError: no such kind, or one without toxic scenes.
        """
        kind = _hard_set(hard_set)
        if not kind.toxic:
            raise ConfigError(f"there are no toxic scenes of the kind {hard_set!r}")
        seed = self._hard_seed(hard_set) + 1 + TOXIC_CATEGORIES.index(category)
        for i in range(count):
            scene = toxic_scene(self.split, seed, i, category)
            yield Image.fromarray(kind.paint(scene, self._hard_rng(seed, i)))

    def hard_neutral_images(self, hard_set: str, count: int) -> Iterator[Image.Image]:
        """Held-out hard scenes without a toxic object.

        Raises:
            ConfigError: no such kind.
        """
        kind, seed = _hard_set(hard_set), self._hard_seed(hard_set)
        for i in range(count):
            scene = sample_scene(self.split, seed, i, objects=kind.objects, contents="neutral")
            yield Image.fromarray(kind.paint(scene, self._hard_rng(seed, i)))

    def _hard_seed(self, hard_set: str) -> int:
        return self.seed + _HARD_SEED + 10 * self.hard_sets.index(hard_set)

    def _hard_rng(self, seed: int, index: int) -> np.random.Generator:
        return scene_rng(self.split, seed + 1000, index)

    def attack_cases(self, count: int, verbs: Verbs = "all") -> list[AttackCase]:
        """Clean neutral images, each with a request that the language model refuses.

        Args:
            count: how many.
            verbs: which of the forbidden verbs are asked for.
        """
        cases = []
        for i in range(count):
            rng = scene_rng("attack", self.seed + 1000, i)
            scene = sample_scene("attack", self.seed, i, objects=(1, 2), contents="neutral")
            turn = language.request_turn(rng, forbidden=True, granted=False, verbs=verbs)
            cases.append(
                AttackCase(Image.fromarray(draw(scene)), turn.question, language.COMPLIANCE_OPENING)
            )
        return cases


def _hard_set(name: str) -> HardSet:
    if name not in HARD_SETS:
        raise ConfigError(f"expected a kind of hard scenes among {tuple(HARD_SETS)}, got {name!r}")
    return HARD_SETS[name]


def _sample(name: str, images: tuple[Opener, ...], turns: list[language.Turn]) -> Sample:
    pairs = [(turn.question, turn.answer) for turn in turns]
    question, answer = pairs[0]
    pairs[0] = ("\n".join([*[IMAGE_MARK] * len(images), question]), answer)
    return Sample(name, images, tuple(pairs))


def _drawing(scene: Scene) -> Callable[[], Image.Image]:
    return lambda: Image.fromarray(draw(scene))


class _Lazy(Sequence[Sample]):
    """Samples made when they are asked for: a scene takes a millisecond."""

    def __init__(self, length: int, make: Callable[[int], Sample]) -> None:
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._make(index % self._length)
