"""Utility on a user's own data: the last samples of it, which no stage has seen."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.recipes.data.encoding import IGNORED, Collator, EncodedSamples, pad_id
from vqguard.recipes.data.samples import SampleSource, split_held_out
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.recipe import RetrofitRecipe


@torch.no_grad()
def measure_held_out(
    ledger: Ledger,
    subject: str,
    model: Any,
    processor: Any,
    source: SampleSource,
    recipe: RetrofitRecipe,
) -> None:
    """`answer_token_rate`: answer tokens that the model ranks first, given those before them.

    Teacher forcing, because a guarded model without a safety map refuses to generate, and a user's
    data bring no categories.
    """
    _, held = split_held_out(source, recipe.evaluation.utility)
    encoded = EncodedSamples(held, processor, recipe.stage2.max_length)
    collate = Collator(pad_id(processor))
    model.eval()
    right: list[bool] = []
    for index in range(len(held)):
        batch = collate([encoded[index]])
        labels = batch.pop("labels")[:, 1:]
        inputs = {k: v.to(model.device) for k, v in batch.items() if not k.startswith("caption")}
        best = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1).cpu()
        scored = labels != IGNORED
        right += (best == labels)[scored].tolist()
    ledger.rate("answer_token_rate", subject, right, samples=len(held))
