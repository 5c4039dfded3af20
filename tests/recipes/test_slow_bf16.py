"""What is said where bfloat16 would cost more than it saves."""

from __future__ import annotations

import pytest
import torch

from vqguard.recipes.training import step


@pytest.mark.parametrize(
    ("gpu", "native", "said"), [(False, False, True), (False, True, False), (True, False, False)]
)
def test_bf16_without_bfloat16_products_is_warned_of(
    gpu: bool,
    native: bool,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(step, "has_bfloat16", lambda: native)
    with caplog.at_level("WARNING"):
        step.warn_of_slow_bf16()
    assert ("bf16=false" in caplog.text) is said
