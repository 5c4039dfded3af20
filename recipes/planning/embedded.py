"""The model that ships with the package, as a plan sees it: its shape, and its data's lengths."""

from __future__ import annotations

from typing import Any

from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.sources import embedded_world
from vqguard.recipes.tiny.model import build_model, build_processor, build_tokenizer
from vqguard.recipes.tiny.weights import shipped_sizes


def embedded_model() -> tuple[Any, int]:
    """The model without its weights, on torch's current device, and its visual tokens an image."""
    sizes = shipped_sizes()
    return build_model(sizes, build_tokenizer()), sizes.patches


def embedded_lengths(recipe: RetrofitRecipe) -> tuple[int, int]:
    """Tokens of the longest sequence in the first batch of each stage."""
    world = embedded_world(recipe)
    processor = build_processor(shipped_sizes(), build_tokenizer())
    safety, batch = recipe.stage2.safety, recipe.stage2.batch
    instructions = [*world.instructions(batch)]
    if safety.share and safety.data is None:
        instructions += world.refusals(batch, safety.most_pictures)
    longest = []
    for stage, samples in (
        (recipe.stage1, world.captions(recipe.stage1.batch)),
        (recipe.stage2, instructions),
    ):
        data = EncodedSamples(samples, processor, stage.max_length)
        longest.append(max(len(data[index]["input_ids"]) for index in range(len(data))))
    return longest[0], longest[1]
