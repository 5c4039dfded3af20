from __future__ import annotations

from typing import Any

import pytest
import torch

from vqguard.errors import InputError
from vqguard.judging.prompts import text_evidence
from vqguard.judging.settings import JudgeSettings
from vqguard.safety_map import SafetyMap

PROMPTS = {"gun": ["a gun"], "neutral": ["a photo", "a plant"]}
EMBEDDINGS = {
    "gun": torch.tensor([[1.0, 0.0, 0.0]]),
    "neutral": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
}
CODEWORDS = torch.tensor([[5.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.1, 0.1]])


def evidence(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "codewords": CODEWORDS,
        "embeddings": EMBEDDINGS,
        "prompts": PROMPTS,
        "categories": ("gun", "knife"),
        "scale": 20.0,
        "strength": 4.0,
        **changes,
    }
    return text_evidence(**arguments)


def test_codewords_get_the_categories_of_the_prompts_they_are_close_to() -> None:
    counts = torch.tensor(evidence().counts)
    assert torch.allclose(counts.sum(dim=1), torch.full((3,), 4.0))
    assert counts.argmax(dim=1).tolist() == [0, 2, 2]
    assert counts[:, 1].tolist() == [0.0] * 3, "knife has no prompts"
    # two prompts are a mean, not a sum: cos 1 with one of them, 0 with the other and with the gun
    odds = float(counts[1, 2] / counts[1, 0])
    assert odds == pytest.approx((torch.exp(torch.tensor(20.0)).item() + 1) / 2, rel=1e-4)


def test_prompts_and_counted_images_combine() -> None:
    counts = torch.tensor([[0, 0, 0], [6, 0, 0], [0, 0, 0]])
    judging = JudgeSettings(text=evidence())
    both = SafetyMap(("gun", "knife"), counts, tau=0.65, judging=judging)
    assert both.category_of(0) == "gun", "from text alone"
    assert both.category_of(1) == "neutral", "6 of 10: not above 0.65"
    assert float(both.probabilities[1, 0]) == pytest.approx(0.6)
    alone = SafetyMap(("gun", "knife"), counts)
    assert [alone.category_of(cell) for cell in range(3)] == ["neutral", "gun", "neutral"]
    again = SafetyMap.from_dict(both.to_dict())
    assert torch.equal(again.probabilities, both.probabilities)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": {"gun": EMBEDDINGS["gun"]}}, "prompts of 'neutral'"),
        ({"embeddings": {"neutral": EMBEDDINGS["neutral"]}}, "at least one toxic"),
        ({"embeddings": {**EMBEDDINGS, "bomb": EMBEDDINGS["gun"]}}, "'bomb'"),
        ({"embeddings": {**EMBEDDINGS, "gun": torch.ones(1, 2)}}, "not in one space"),
        ({"embeddings": {**EMBEDDINGS, "gun": torch.full((1, 3), float("nan"))}}, "NaN"),
        ({"strength": 0.0}, "positive numbers"),
        ({"scale": float("inf")}, "positive numbers"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evidence(**changes)
