"""Figures of an evaluation and their intervals."""

from __future__ import annotations

import pytest

from vqguard.recipes.evaluation.ledger import Ledger


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_the_interval_of_one_share_says_that_nothing_is_known(value: float) -> None:
    """One question of a kind must not end an evaluation that follows hours of training."""
    record = Ledger("a command", 0).mean("naming_recall", "base", [value])
    assert (record.value, record.n, record.low, record.high) == (value, 1, 0.0, 1.0)


def test_a_mean_lies_in_its_interval() -> None:
    record = Ledger("a command", 0).mean("naming_recall", "base", [0.0, 0.5, 1.0, 1.0])
    assert record.low is not None
    assert record.high is not None
    assert 0 <= record.low <= record.value == 0.625 <= record.high <= 1
