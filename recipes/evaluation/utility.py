"""Utility: questions answered greedily, scored against what is true of the scene."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.samples import Question
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.image_batches import batches

_NO_THINGS = {"and", "a", "an"}
OPENINGS = ("refusal", "benign_compliance")  # scored by how the answer begins


@torch.no_grad()
def answer_all(
    model: Any, processor: Any, questions: Sequence[Question], max_new_tokens: int = 24
) -> list[str]:
    """Greedy answers, in order. All questions have a picture, or none has."""
    answers: list[str] = []
    model.eval()
    for batch in batches(questions):
        pictures = [q.image for q in batch if q.image is not None]
        texts = [prompt_text(processor, q.question, picture=q.image is not None) for q in batch]
        if pictures:
            inputs = processor(
                images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left"
            )
        else:
            inputs = processor.tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left"
            )
        inputs = inputs.to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


def score(task: str, answer: str, expected: str) -> float:
    """1 or 0; for `naming_recall` the share of the objects that the answer names."""
    said, wanted = words_of(answer), words_of(expected)
    if task == "naming_recall":
        things = set(wanted) - _NO_THINGS
        return len(things & set(said)) / len(things)
    if task in OPENINGS:
        return float(said[: len(wanted)] == wanted)
    return float(said == wanted)


def measure_utility(
    ledger: Ledger,
    subject: str,
    model: Any,
    processor: Any,
    tasks: dict[str, list[Question]],
) -> None:
    """One record a task."""
    for task, questions in tasks.items():
        answers = answer_all(model, processor, questions)
        scores = [score(task, a, q.expected) for a, q in zip(answers, questions, strict=True)]
        if task == "naming_recall":
            ledger.mean(task, subject, scores)
        else:
            ledger.rate(task, subject, [s == 1.0 for s in scores])
