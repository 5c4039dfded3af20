"""Tests that need a newer transformers than the oldest one that is supported."""

from __future__ import annotations

import pytest
import transformers


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("transformers_from"):
        (oldest,) = mark.args
        found = transformers.__version__.split(".")
        if tuple(map(int, found[:2])) < tuple(map(int, oldest.split("."))):
            pytest.skip(f"what is tested is in transformers from {oldest} on: {mark.kwargs['why']}")


@pytest.fixture
def open_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters in the tables of attacks and gradient modes is gone after it."""
    from vqguard.redteam import ATTACKS, GRADIENTS  # not every test needs torch

    for table in (ATTACKS, GRADIENTS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))
