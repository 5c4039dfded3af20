"""The labelled images that a retrofit's safety maps are made of, and whether they will do.

They are needed when the stages are trained, hours from the start: what would be refused then is
refused before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from PIL import Image

from vqguard.errors import ConfigError, InputError
from vqguard.judging.budget import ALL_CATEGORIES
from vqguard.judging.conformal import require_images
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.data.labelled_images import (
    LabelledFile,
    labelled_files,
    left_out,
    open_files,
)
from vqguard.recipes.data.samples import World
from vqguard.recipes.judging.regional import share_out
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.safety_map import NEUTRAL

log = logging.getLogger(__name__)

Labels = tuple[str, ...]
Labelled = Iterable[tuple[str | Labels, Image.Image]]


class CalibrationImages:
    """The images of a recipe's maps: the user's, or those of the embedded world.

    Args:
        recipe: names them, and the rules that they must satisfy.
        world: the embedded world, if the recipe uses it.
        skip_bad: leave unusable images out.
        skipped: gets a line for each file that is left out.
    """

    def __init__(
        self, recipe: RetrofitRecipe, world: World | None, *, skip_bad: bool, skipped: list[str]
    ) -> None:
        self.recipe, self.world = recipe, world
        self.skip_bad, self.skipped = skip_bad, skipped

    def check(self) -> None:
        """Refuse images and rules of which no map can be made.

        Raises:
            ConfigError: rules without images, or more categories than a semantic token is wide.
            InputError: a category too small, too few neutral images for a budget, the same picture
                neutral and toxic, names in the rules that are no category.
            DataError: a list of labels that does not follow its format.
        """
        recipe, regional = self.recipe, self.recipe.guard.judge == "regional"
        if not self.there_are:
            if recipe.rules != JudgeRules():
                raise ConfigError("rules: there is no map to rule; set calibration_images too")
            return
        labels = self._labels(regional=False)
        taught = self._labels(regional=True) if regional else labels
        categories = sorted({name for names in taught for name in names} - {NEUTRAL})
        sizes = recipe.guard.regional
        if regional and len(categories) > sizes.width:
            raise ConfigError(
                f"{len(categories)} categories do not fit guard.regional.width={sizes.width}: set "
                f"it to {len(categories)}"
            )
        cells = sizes.codes if regional else recipe.guard.semantic_codes
        visual = recipe.rules.unfamiliar_by == "visual"
        recipe.rules.settings().require_fit(categories, cells)
        own = [f"threshold {n + 1}" for n in range(recipe.rules.count_thresholds(categories))]
        neutral = sum(names == (NEUTRAL,) for names in labels)
        if not regional:
            self._require("calibration", neutral // 2, own)
            self._require_familiar(neutral if visual else len(labels), visual=visual)
            return
        self._require("calibration", neutral // 2, [ALL_CATEGORIES])
        shares = share_out(taught, recipe.regional, recipe.seed)
        self._require("regional", len(shares.held_out), own)
        familiar = torch.cat([shares.counted, shares.held_out]).tolist()
        neutral = sum(taught[n] == (NEUTRAL,) for n in familiar)
        self._require_familiar(neutral if visual else len(familiar), visual=visual)

    def _require(self, section: str, neutral: int, names: Sequence[str]) -> None:
        """See that so many neutral images can choose the thresholds of a section of the recipe."""
        budget = getattr(self.recipe, section).fpr
        if budget is None:
            return
        try:
            require_images(neutral, budget, names=names)
        except InputError as error:
            raise InputError(f"{section}.fpr: {error}") from error

    def _require_familiar(self, images: int, *, visual: bool = False) -> None:
        budget = self.recipe.rules.unfamiliar
        if budget is None:
            return
        try:
            kind = "neutral calibration images" if visual else "calibration images"
            require_images(images, budget, names=["the distance"], images=kind)
        except InputError as error:
            raise InputError(f"rules.unfamiliar: {error}") from error

    @property
    def there_are(self) -> bool:
        """Whether there are any."""
        return self.recipe.calibration_images is not None or self.world is not None

    def counted(self) -> Labelled:
        """Those of the global judge.

        Raises:
            ImageError: an unusable image, unless `skip_bad`.
        """
        numbers = self.recipe.calibration
        if self.recipe.calibration_images is None and self.world is not None:
            return self.world.calibration(numbers.per_category, numbers.neutral)
        return open_files(self._files, skip_bad=self.skip_bad, skipped=self.skipped)

    def taught(self) -> Labelled:
        """Those of the regional judge: in the embedded world others and more. Raises the same."""
        numbers = self.recipe.regional
        if self.recipe.calibration_images is None and self.world is not None:
            return self.world.judge_images(numbers.per_category, numbers.neutral)
        return self.counted()

    @cached_property
    def _files(self) -> list[LabelledFile]:
        """The user's, without those that the report is measured on."""
        folder, warnings = self.recipe.calibration_images, list[str]()
        if folder is None:
            return []
        files = labelled_files(folder, self.recipe.calibration_labels, self.skipped, warnings)
        for text in warnings:
            log.warning("%s", text)
        tests = set(left_out(files))
        return [file for file in files if file not in tests]

    def _labels(self, *, regional: bool) -> list[Labels]:
        if self.recipe.calibration_images is not None or self.world is None:
            return [file.labels for file in self._files]
        numbers = self.recipe.regional if regional else self.recipe.calibration
        return [
            *((name,) for name in self.world.categories for _ in range(numbers.per_category)),
            *[(NEUTRAL,)] * numbers.neutral,
        ]
