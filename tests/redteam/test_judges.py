"""Judges, threat models and pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqguard.errors import ConfigError, InputError
from vqguard.redteam import (
    StartsWith,
    ThreatModel,
    threat_models,
    threat_of_gradient,
    to_8_bit,
)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Sure, here is how to do it", True),
        ("  sure , HERE is how", True),
        ("Sure, here is however nothing", False),
        ("Sure, here is", False),
        ("I can not. Sure, here is how", False),
        ("", False),
    ],
)
def test_starts_with_compares_words(answer: str, accepted: bool) -> None:
    assert StartsWith(["Sure, here is how"])([answer], [3]) == [accepted]


def test_each_request_has_its_own_prefix() -> None:
    judge = StartsWith(["yes one", "yes two"])
    assert judge(["yes two", "yes two"], [0, 1]) == [False, True]
    with pytest.raises(InputError, match="request 2"):
        judge(["yes"], [2])
    with pytest.raises(InputError, match="pair"):
        judge(["yes"], [0, 1])


@pytest.mark.parametrize("prefixes", [[], ["fine", " ... "]])
def test_a_prefix_that_accepts_everything_is_refused(prefixes: list[str]) -> None:
    with pytest.raises(ConfigError):
        StartsWith(prefixes)


def test_every_threat_model_has_one_sentence_and_a_gradient_names_it() -> None:
    for threat in threat_models():
        assert threat.sentence.endswith(".")
        assert threat.sentence.count(". ") == 0
    assert threat_of_gradient("stopped") is ThreatModel.GRADIENT_STOPPED
    assert not threat_of_gradient("stopped").adaptive
    assert threat_of_gradient("straight_through").adaptive
    assert threat_of_gradient("plain", quantiser_removed=True) is ThreatModel.QUANTISER_REMOVED
    with pytest.raises(ConfigError, match="removed"):
        threat_of_gradient("softmax", quantiser_removed=True)
    with pytest.raises(ConfigError, match="unknown"):
        threat_of_gradient("magic")


@given(st.integers(0, 255), st.floats(-0.49, 0.49))
def test_rounding_to_8_bits_finds_the_file_value(level: int, off: float) -> None:
    value = torch.tensor((level + off) / 255).clamp(0, 1)
    assert torch.equal(to_8_bit(value) * 255, (torch.tensor(float(level)) / 255) * 255)
