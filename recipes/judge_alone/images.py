"""The labelled images of a judge alone, and which of them serve what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from vqguard.adapters import resolve_model
from vqguard.errors import ConfigError, ImageError, InputError
from vqguard.images import open_image
from vqguard.judging.conformal import least_images
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.data.labelled_images import labelled_files
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.judging.regional import Shares, share_out
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.safety_map import NEUTRAL

ENOUGH = 20
"""Images a category from which on a judge is worth its name (docs/judge.md has the curve)."""
_LEAST = 3  # one to learn from, one to count, one to test on
_TO_LEARN = 0.3  # share of the neutral images that is left to learn from and to count, at least


@dataclass(frozen=True)
class LabelledImage:
    """An image that is opened when it is asked for."""

    name: str
    """How messages and the report call it."""
    labels: tuple[str, ...]
    open: Callable[[], Image.Image]
    """Raises ImageError."""


@dataclass(frozen=True)
class JudgeImages:
    """The images of a recipe, in a fixed order.

    Raises as `images_of`.
    """

    images: list[LabelledImage]
    skipped: list[str] = field(default_factory=list)
    """Files that are no images, and those that could not be opened."""
    warnings: list[str] = field(default_factory=list)
    """What to mend about the images, although a judge can be made of them."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The toxic categories, sorted."""
        return tuple(sorted({name for image in self.images for name in image.labels} - {NEUTRAL}))

    def opened(
        self, numbers: Sequence[int], *, skip_bad: bool
    ) -> Iterator[tuple[int, Image.Image]]:
        """(number, picture) of the chosen images.

        Raises:
            ImageError: one that cannot be opened, unless `skip_bad`; then `skipped` lists it.
        """
        for number in numbers:
            try:
                yield number, self.images[number].open()
            except ImageError as error:
                if not skip_bad:
                    raise ImageError(f"{error}. With --skip-bad it is left out.") from error
                self.skipped.append(str(error))


@dataclass(frozen=True)
class Parts:
    """Which images serve what, by their numbers."""

    shares: Shares
    """What the judge is made of."""
    tested: Tensor
    """(n,) int64: what the report is measured on, and nothing else."""


def images_of(recipe: JudgeRecipe) -> JudgeImages:
    """The labelled images that a recipe names; without names, those of the embedded world.

    Raises:
        InputError: no images, no neutral ones, one that is neutral and toxic, a category too small.
        DataError: a list of labels that does not follow its format.
        ConfigError: a recipe without images for a model without a world.
    """
    skipped: list[str] = []
    warnings: list[str] = []
    if recipe.images is None:
        images = _of_world(recipe)
    else:
        images = [
            LabelledImage(str(file.path), file.labels, partial(open_image, file.path))
            for file in labelled_files(recipe.images, recipe.labels, skipped, warnings)
        ]
    counts = Counter(name for image in images for name in image.labels)
    for category, count in counts.items():
        if count < _LEAST:
            raise InputError(
                f"the category {category!r} has {count} different image{'s' * (count > 1)}, and at "
                f"least {_LEAST} are needed: to learn from, to count and to test on. Give it "
                f"{ENOUGH} or more, or take it away"
            )
    few = [f"{name} ({count})" for name, count in counts.items() if count < ENOUGH]
    if few:
        warnings.append(
            f"fewer than {ENOUGH} images: {', '.join(few)}. What is found of such a category "
            "varies much from one choice of images to the next"
        )
    return JudgeImages(images, skipped, warnings)


def parts_of(images: JudgeImages, recipe: JudgeRecipe, rules: JudgeRules) -> Parts:
    """Share the images out, drawn by the recipe's seed.

    A share of each category is set aside to be tested on. Of the other neutral images as many
    choose the threshold as the budget needs, if that is more than the recipe's share. Toxic images
    are few: all are both learnt from and counted, which the threshold's guarantee does not mind.

    Raises:
        InputError: too few neutral images for the budget.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    labels = [image.labels for image in images.images]
    tested: list[int] = []
    for category in sorted({names[0] for names in labels}):
        members = torch.tensor([n for n, names in enumerate(labels) if names[0] == category])
        drawn = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(recipe.held_out * len(drawn))), max(0, len(drawn) - 2))
        tested += drawn[:count].tolist()
    left = sorted(set(range(len(labels))) - set(tested))
    settings = _room_for_threshold(
        sum(labels[n] == (NEUTRAL,) for n in left),
        recipe,
        rules.count_thresholds(images.categories),
    )
    shares = share_out([labels[n] for n in left], settings, recipe.seed)
    places = torch.tensor(left)
    trained, counted, held_out = (places[share] for share in shares)
    toxic = torch.tensor([n for n in left if labels[n] != (NEUTRAL,)])
    return Parts(
        Shares(_with(trained, toxic), _with(counted, toxic), held_out),
        torch.tensor(sorted(tested)),
    )


def _with(share: Tensor, more: Tensor) -> Tensor:
    return torch.tensor(sorted({*share.tolist(), *more.tolist()}))


def _room_for_threshold(neutral: int, recipe: JudgeRecipe, thresholds: int) -> RegionalRecipe:
    """The recipe's shares of so many neutral images, with enough for the threshold."""
    settings = recipe.regional
    if settings.fpr is None:  # a threshold that is given needs no images
        return settings
    used = settings.trained + settings.counted
    needed = least_images(settings.fpr, thresholds)
    kept = round(used * neutral)
    if neutral - kept >= needed:
        return settings
    kept = neutral - needed
    if kept < max(2, _TO_LEARN * neutral):
        most = math.floor((1 - _TO_LEARN) * neutral)
        more = math.ceil(needed / (1 - _TO_LEARN) / (1 - recipe.held_out)) + 1
        possible = math.ceil(1e4 * thresholds / (most + 1)) / 1e4
        remedy = f", or --fpr {possible:g}" if possible < 1 else ""
        raise InputError(
            f"a false-positive rate of {settings.fpr:.2%} needs {needed} neutral images that serve"
            f" the threshold{'s' * (thresholds > 1)} alone, and there are {neutral} beside those"
            f" that the report is measured on: give at least {more} neutral images in all{remedy}"
        )
    scale = kept / neutral / used
    return replace(settings, trained=settings.trained * scale, counted=settings.counted * scale)


def _of_world(recipe: JudgeRecipe) -> list[LabelledImage]:
    if resolve_model(recipe.model).source != "package":
        raise ConfigError(
            f"{recipe.model} has no embedded images: give --images DIR with one folder a category, "
            f"one of them called {NEUTRAL!r}"
        )
    numbers = recipe.regional
    drawn = TinyWorld(recipe.seed).judge_images(numbers.per_category, numbers.neutral)
    return [
        LabelledImage(f"{category} scene {number}", (category,), image.copy)
        for number, (category, image) in enumerate(drawn)
    ]
