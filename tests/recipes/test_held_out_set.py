"""Tests of a user's own in a folder: what is read, what is refused, what is scored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.held_out_set import HeldOutSet
from vqguard.recipes.evaluation.text import text_perplexity
from vqguard.recipes.evaluation.utility import score


def entry(number: int, *, image: bool = True, **more: str) -> dict[str, Any]:
    mark = "<image>\n" if image else ""
    said = [{"from": "human", "value": f"{mark}What?"}, {"from": "gpt", "value": f"A {number}."}]
    shown = {"image": "pictures/a.png"} if image else {}
    return {"id": str(number), **shown, "conversations": said, **more}


def write(folder: Path, name: str, entries: Any) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), "red").save(folder / "pictures" / "a.png")
    (folder / name).write_text(json.dumps(entries))


def test_questions_by_task_and_no_more_than_asked_for(tmp_path: Path) -> None:
    tasks = ["naming", "naming", "count", "naming"]
    write(tmp_path, "questions.json", [entry(i, task=task) for i, task in enumerate(tasks)])
    found = HeldOutSet(tmp_path).questions(2)
    assert {task: [q.expected for q in some] for task, some in found.items()} == {
        "naming": ["A 0.", "A 1."],
        "count": ["A 2."],
    }
    first = found["naming"][0]
    assert first.question == "What?"
    assert first.image is not None
    assert first.image.size == (40, 40)


def test_attacks_screening_and_text(tmp_path: Path) -> None:
    write(tmp_path, "attacks.json", [entry(i) for i in range(3)])
    for category in ("gun", "neutral"):
        (tmp_path / "screening" / category).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / "screening" / category / "b.png")
    (tmp_path / "text.txt").write_text("A text.")
    tests = HeldOutSet(tmp_path)
    assert [case.opening for case in tests.attack_cases(2)] == ["A 0.", "A 1."]
    assert tests.categories == ("gun", "neutral")
    assert [image.size for image in tests.images("gun")] == [(30, 30)]
    assert tests.text == "A text."
    assert tests.questions(5) == {}


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found none of them.*held_out"):
        HeldOutSet(tmp_path)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({}, "non-empty JSON list"),
        ([entry(0)], "expected 'task'"),
        ([{**entry(0, task="naming"), "image": "../b.png"}], "leaves the image root"),
        ([{"task": "naming"}], "entry 0"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, entries: Any, says: str) -> None:
    write(tmp_path, "questions.json", entries)
    with pytest.raises(DataError, match=says):
        HeldOutSet(tmp_path)


def test_an_attack_needs_a_picture(tmp_path: Path) -> None:
    write(tmp_path, "attacks.json", [entry(0, image=False)])
    with pytest.raises(DataError, match="no 'image'"):
        HeldOutSet(tmp_path).attack_cases(1)


def test_articles_are_no_things() -> None:
    assert score("naming_recall", "An owl.", "An owl and a dog.") == 0.5
    assert score("naming_recall", "A cat and a fox.", "An owl and a dog.") == 0.0


class _Counting:
    """A model of two tokens: token 1 follows with probability 3/4 always."""

    device = torch.device("cpu")

    def eval(self) -> None: ...

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.tensor([0.25, 0.75]).log().expand(*input_ids.shape, 2)
        return type("Output", (), {"logits": logits})


def test_perplexity_is_that_of_the_scored_tokens() -> None:
    def tokenizer(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[int(c) for c in text]])}

    # Windows of three: the first token of each is not scored, one that is alone is not either.
    value, scored = text_perplexity(_Counting(), tokenizer, "0110100", window=3)
    assert scored == 4
    nats = -(3 * math.log(0.75) + math.log(0.25)) / 4
    assert value == pytest.approx(math.exp(nats))
    with pytest.raises(InputError, match="two tokens"):
        text_perplexity(_Counting(), tokenizer, "1")
