"""The samples of a run: what each stage trains on, and what the codebooks start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from vqguard.errors import ConfigError, InputError
from vqguard.recipes.benchmarks.vlguard import read_refusals
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.fitting import Fitting
from vqguard.recipes.data.mixture import mixed_in
from vqguard.recipes.data.records.checked import Checks
from vqguard.recipes.data.records.lazy import LazySamples
from vqguard.recipes.data.samples import Sample, pictures_of, split_held_out
from vqguard.recipes.judging.calibration_images import CalibrationImages
from vqguard.recipes.models import base_processor
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.sources import source_of, world_of

CHECKED = "checked.safetensors"
"""In a run's directory: what the check of its data found out."""

_ANY_LENGTH = 2**31


class RunSamples:
    """The recipe's data, shared out. Samples that the evaluation asks about are in no stage.

    Every record of a user's data is checked against what the stages need of it, unless that was
    done before.

    Args:
        recipe: names the data.
        skip_bad: leave unusable samples and pictures out and list them in `skipped`.
        run: the run's directory, where what an earlier check found may be.

    Raises:
        DataError: as the recipe's reader does, and for samples that cannot be encoded.
    """

    def __init__(self, recipe: RetrofitRecipe, *, skip_bad: bool, run: Path | None = None) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.world = world_of(recipe)
        own = self.world is None or recipe.stage2.safety.data is not None
        self._checks = checks_of(recipe, run) if own else None
        source = source_of(recipe, skip_bad=skip_bad, skipped=self.skipped, checks=self._checks)
        captions = LazySamples.of(
            source.captions(max(recipe.stage1.samples, recipe.guard.start_samples))
        )
        if self.world is not None:
            instructions = LazySamples.of(source.instructions(recipe.stage2.samples))
        else:
            left, held_out = split_held_out(source, recipe.evaluation.utility)
            instructions = LazySamples.of(left)
            captions = captions.without(LazySamples.of(held_out))
        self.instructions = self._with_refusals(recipe, instructions[: recipe.stage2.samples])
        """Stage 2's."""
        self.captions = captions[: recipe.stage1.samples]
        """Stage 1's."""
        self.starters = captions[: recipe.guard.start_samples]
        """Those whose features the codebooks start from."""
        self.calibration = CalibrationImages(
            recipe, self.world, skip_bad=skip_bad, skipped=self.skipped
        )
        """What the safety maps are made of."""

    def keep_checks(self, run: Path) -> None:
        """Write down what the check of the data found, so that it need not be done again."""
        if self._checks is not None:
            self._checks.save(run / CHECKED)

    def _with_refusals(self, recipe: RetrofitRecipe, samples: LazySamples) -> LazySamples:
        """Stage 2's samples with the share of refusals that the recipe wants."""
        safety = recipe.stage2.safety
        if not safety.share:
            return samples
        if safety.data is not None:
            read = read_refusals(
                safety.data,
                safety.images,
                seed=recipe.seed,
                skip_bad=self.skip_bad,
                checks=self._checks,
                follow_links=recipe.follow_links,
            )
            self.skipped += read.skipped
            refusals = read.instructions(len(read.samples))
        elif self.world is not None:
            wanted = max(1, round(safety.share * len(samples)))
            refusals = self.world.refusals(wanted, safety.most_pictures)
            if safety.most_pictures > 1:
                _require_room(recipe, refusals)
        else:  # the recipe refuses it
            raise ConfigError("stage2.safety.share: expected a file of refusals in safety.data")
        return mixed_in(samples, refusals, safety.share, recipe.seed)

    def pictures(self, samples: Sequence[Sample]) -> Iterator[Image.Image]:
        """Every picture of the samples and every frame of their videos, one after the other.

        Raises:
            InputError: one that cannot be opened, unless `skip_bad`.
        """
        for sample in samples:
            for opener in sample.shown:
                try:
                    pictures = pictures_of(opener)
                except InputError as error:
                    if not self.skip_bad:
                        raise
                    self.skipped.append(str(error))
                else:
                    yield from pictures


def _require_room(recipe: RetrofitRecipe, refusals: Sequence[Sample]) -> None:
    """Raise `ConfigError` where a message of the most pictures would be cut in stage 2."""
    most = max(refusals, key=lambda sample: len(sample.images))
    room = recipe.stage2.max_length
    # Encoded with room for itself: the pictures of a sample that is cut are an error of its own.
    whole = EncodedSamples([most], base_processor(recipe), _ANY_LENGTH).whole(most)
    needed = len(whole.example["input_ids"])
    if needed > room:
        raise ConfigError(
            f"stage2.safety.pictures: {len(most.images)} pictures and their requests take {needed} "
            f"tokens, and stage2.max_length is {room}. Raise that, or show fewer pictures."
        )


def checks_of(recipe: RetrofitRecipe, run: Path | None) -> Checks:
    """How a recipe's records are checked, with what is known of them in the run's directory."""
    lengths = recipe.stage1.max_length, recipe.stage2.max_length
    fitting = Fitting(base_processor(recipe), *lengths)
    checks = Checks(fitting, fitting.identity)
    if run is not None:
        checks.load(run / CHECKED)
    return checks
