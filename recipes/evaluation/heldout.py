"""Utility on a user's own data: the last samples of it, which no stage has seen."""

from __future__ import annotations

from typing import Any

from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.utility import answer_all, words_of
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.samples import Question, Sample, SampleSource

_ALL = 2**62


def split_held_out(
    source: SampleSource, recipe: RetrofitRecipe
) -> tuple[list[Sample], list[Sample]]:
    """(training, held out): the last twentieth of the instructions, at most ``utility`` of them."""
    samples = list(source.instructions(_ALL))
    kept = max(1, min(recipe.evaluation.utility, len(samples) // 20))
    return samples[:-kept], samples[-kept:]


def measure_held_out(
    ledger: Ledger,
    subject: str,
    model: Any,
    processor: Any,
    source: SampleSource,
    recipe: RetrofitRecipe,
) -> None:
    """``answer_match_rate``: first answers that equal the reference word for word."""
    _, held = split_held_out(source, recipe)
    for picture in (True, False):
        chosen = [s for s in held if (s.image is not None) == picture]
        if not chosen:
            continue
        questions = [
            Question(s.image() if s.image else None, s.turns[0][0], s.turns[0][1]) for s in chosen
        ]
        answers = answer_all(model, processor, questions, max_new_tokens=64)
        right = [
            words_of(a) == words_of(q.expected) for a, q in zip(answers, questions, strict=True)
        ]
        ledger.rate("answer_match_rate", subject, right, picture=picture)
