"""Answers to questions that only a benchmark's own grader can judge, in the form that it reads.

And how many of them were refused: the pictures and questions of such benchmarks are harmless.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vqguard.files import replace_text
from vqguard.recipes.benchmarks.benchmark import Benchmark, Item
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.utility import answer_all
from vqguard.redteam import NoRefusal

log = logging.getLogger("vqguard.recipes.evaluate")

ANSWERS = "answers"
"""In a run's directory: a folder a subject, with a file a benchmark."""
_LONGEST = 256  # tokens of an answer


@torch.no_grad()
def answer_ungraded(
    ledger: Ledger,
    subject: str,
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    count: int,
    run: Path,
) -> None:
    """Write the answers of a model to a benchmark's first `count` such questions, if it has any.

    Recorded is `over_refusal_rate`, by refusal phrases.
    """
    items = benchmark.ungraded()[:count]
    if not items:
        return
    log.info("evaluation: %s, %s", benchmark.layout.title, subject)
    questions = [item.question() for item in items]
    answers = answer_all(model, processor, questions, _LONGEST)
    answered = NoRefusal()(answers, list(range(len(answers))))
    refused = [not each for each in answered]
    ledger.rate("over_refusal_rate", subject, refused, benchmark=benchmark.name)
    for name in dict.fromkeys(item.part.answers for item in items):
        mine = [pair for pair in zip(items, answers, strict=True) if pair[0].part.answers == name]
        path = run / ANSWERS / subject / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, _written(name, mine, subject))
        log.info("%s: %d answers for its authors' grader: %s", subject, len(mine), path)


def _written(name: str, pairs: Sequence[tuple[Item, str]], subject: str) -> str:
    """A grader's file."""
    entries = []
    for item, answer in pairs:
        row = {**item.row, "answer": answer.strip(), "subject": subject}
        entries.append(item.told(row))
    if name.endswith(".jsonl"):
        return "".join(json.dumps(entry) + "\n" for entry in entries)
    if all(item.part.by_key for item, _ in pairs):
        return json.dumps({key: value for entry in entries for key, value in entry.items()})
    return json.dumps(entries)
