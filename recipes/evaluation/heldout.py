"""What can be measured on a user's own data: its last samples, which no stage has seen.

And images of the folders that the safety map is made of, which were left out of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vqguard.recipes.data.encoding import IGNORED, Collator, EncodedSamples, pad_id
from vqguard.recipes.data.samples import (
    IMAGE_MARK,
    VIDEO_MARK,
    Question,
    SampleSource,
    pictures_of,
    split_held_out,
)
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.overhead import measure_latency
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
    """`answer_token_rate` and `held_out_loss` of answer tokens, given those before them.

    The share that the model ranks first, and the mean negative log-likelihood in nats. Teacher
    forcing, because a guarded model without a safety map refuses to generate, and a user's data
    bring no categories.
    """
    _, held = split_held_out(source, recipe.evaluation.utility)
    encoded = EncodedSamples(held, processor, recipe.stage2.max_length)
    collate = Collator(pad_id(processor))
    model.eval()
    right: list[bool] = []
    loss = 0.0
    for index in range(len(held)):
        batch = collate([encoded[index]])
        labels = batch.pop("labels")[:, 1:]
        inputs = {k: v.to(model.device) for k, v in batch.items() if not k.startswith("caption")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float().cpu()
        scored = labels != IGNORED
        right += (logits.argmax(-1) == labels)[scored].tolist()
        loss += float(cross_entropy(logits[scored].double(), labels[scored], reduction="sum"))
    ledger.rate("answer_token_rate", subject, right, samples=len(held))
    ledger.value("held_out_loss", subject, loss / len(right), len(right), samples=len(held))


def measure_own_latency(
    ledger: Ledger, model: Any, processor: Any, source: SampleSource, recipe: RetrofitRecipe
) -> None:
    """`latency_ratio` on the first picture, or frame, of the data; nothing without a safety map.

    A guarded model without one does not answer about pictures.
    """
    (sample,) = source.captions(1)
    picture = pictures_of(sample.shown[0])[0]
    question = sample.turns[0][0].replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()
    if model.vqguard.safety_map is not None and question:
        asked = Question(picture, question, "")
        measure_latency(ledger, model, processor, asked, recipe.evaluation.latency_rounds)
