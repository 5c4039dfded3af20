"""Which data a recipe means."""

from __future__ import annotations

from vqguard.adapters import resolve_model
from vqguard.errors import ConfigError
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.records.checked import Checks
from vqguard.recipes.data.samples import SampleSource, World
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.tiny.world import TinyWorld


def world_of(recipe: RetrofitRecipe) -> World | None:
    """The embedded world, if the recipe uses it; None if it names data of the user's own.

    Raises:
        ConfigError: neither the recipe nor the model brings data.
    """
    return embedded_world(recipe) if recipe.data is None else None


def source_of(
    recipe: RetrofitRecipe,
    *,
    skip_bad: bool = False,
    skipped: list[str] | None = None,
    checks: Checks | None = None,
) -> SampleSource:
    """The recipe's training samples.

    Args:
        skip_bad: leave bad entries of a data file out.
        skipped: collects what was left out.
        checks: what samples must pass besides, and what is known of them.
    """
    if recipe.data is None:
        return embedded_world(recipe)
    data = read_data(
        recipe.data,
        recipe.images,
        seed=recipe.seed,
        skip_bad=skip_bad,
        columns=recipe.columns,
        checks=checks,
        follow_links=recipe.follow_links,
        frames=recipe.video_frames,
    )
    if skipped is not None:
        skipped += data.skipped
    return data


def embedded_world(recipe: RetrofitRecipe) -> World:
    """The world of llava-tiny.

    Raises:
        ConfigError: another model.
    """
    if resolve_model(recipe.model).source != "package":
        raise ConfigError(
            f"{recipe.model} has no embedded data. Give a LLaVA-format file with --data and its "
            "images' root with --images."
        )
    return TinyWorld(recipe.seed, recipe.evaluation.split, recipe.stage2.held_out_verbs)
