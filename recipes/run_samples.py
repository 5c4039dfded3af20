"""The samples of a run: what each stage trains on, and what the codebooks start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from vqguard.errors import InputError
from vqguard.recipes.data.samples import Sample, split_held_out
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.sources import source_of, world_of


class RunSamples:
    """The recipe's data, shared out. Samples that the evaluation asks about are in no stage.

    Args:
        skip_bad: leave unusable samples and pictures out and list them in `skipped`.

    Raises:
        DataError: as the recipe's reader does.
    """

    def __init__(self, recipe: RetrofitRecipe, *, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.world = world_of(recipe)
        source = source_of(recipe, skip_bad=skip_bad, skipped=self.skipped)
        captions = list(source.captions(max(recipe.stage1.samples, recipe.guard.start_samples)))
        if self.world is not None:
            instructions = list(source.instructions(recipe.stage2.samples))
        else:
            instructions, held_out = split_held_out(source, recipe.evaluation.utility)
            asked = {sample.id for sample in held_out}
            captions = [sample for sample in captions if sample.id not in asked]
        self.instructions = instructions[: recipe.stage2.samples]
        """Stage 2's."""
        self.captions = captions[: recipe.stage1.samples]
        """Stage 1's."""
        self.starters = captions[: recipe.guard.start_samples]
        """Those whose features the codebooks start from."""

    def pictures(self, samples: Sequence[Sample]) -> Iterator[Image.Image]:
        """Every picture of the samples, opened one after the other.

        Raises:
            InputError: one that cannot be opened, unless `skip_bad`.
        """
        for sample in samples:
            for opener in sample.images:
                try:
                    yield opener()
                except InputError as error:
                    if not self.skip_bad:
                        raise
                    self.skipped.append(str(error))
