"""Batches of pictures that are computed two at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vqguard.recipes.image_batches import collect_features, side_by_side

from .conftest import MakeModel, noisy_pictures

ON_A_PROCESSOR: Any = SimpleNamespace(device=torch.device("cpu"))


def test_two_are_computed_at_once_and_come_in_order(two_threads: None) -> None:
    meeting = threading.Barrier(2, timeout=60)
    threads: list[int] = []
    where: ContextVar[str] = ContextVar("where", default="nowhere")
    where.set("here")

    def work(item: int) -> tuple[int, str, bool]:
        meeting.wait()
        threads.append(torch.get_num_threads())
        return item * item, where.get(), torch.is_grad_enabled()

    done = list(side_by_side(ON_A_PROCESSOR, work, range(6)))
    assert done == [(item, (item * item, "here", False)) for item in range(6)]
    assert threads == [1] * 6
    assert torch.get_num_threads() == 2


def test_what_fails_is_raised_in_its_turn(two_threads: None) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        return item

    results = side_by_side(ON_A_PROCESSOR, work, range(9))
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert torch.get_num_threads() == 2


def test_no_more_is_begun_than_is_wanted(two_threads: None) -> None:
    drawn: list[int] = []

    def draw() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    results = side_by_side(ON_A_PROCESSOR, lambda item: item, draw())
    assert next(results) == (0, 0)
    results.close()  # type: ignore[attr-defined]
    assert drawn == [0, 1, 2]


def test_features_are_those_of_one_thread(small_guarded: MakeModel, two_threads: None) -> None:
    model, processor = small_guarded()
    pictures = noisy_pictures(150)
    found = collect_features(model, processor, pictures)
    torch.set_num_threads(1)
    alone = collect_features(model, processor, pictures)
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])
