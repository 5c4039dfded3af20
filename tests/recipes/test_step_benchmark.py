"""benchmarks/training.py: guarded and unguarded steps in turn, on a small case."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from vqguard.recipes.recipe import RetrofitRecipe, load_recipe

# The root is not on the path of a plain `pytest`: `import adapters` would make a second registry.
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(Path(__file__).parents[2]))
    training: Any = importlib.import_module("benchmarks.training")

SMALL = [
    *("guard.patch_codes=16", "guard.semantic_codes=4"),
    *("stage1.batch=2", "stage2.batch=2", "stage1.max_length=128", "stage2.max_length=128"),
]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(training, "_START_IMAGES", 8)
    return training.shortened(load_recipe("llava-tiny").override(SMALL), training.WARM_UP + 3)


def test_one_works_at_a_time_and_each_turn_is_timed() -> None:
    seen: list[str] = []

    def work(name: str, turns: Any) -> None:
        for _ in range(3):
            turns.next_turn(name)
            seen.append(name)
            time.sleep(0.02)
            seen.append(name)

    turns = training.in_turns(
        {"a": lambda turns: work("a", turns), "b": lambda turns: work("b", turns)}, threads=1
    )
    assert seen == ["a", "a", "b", "b"] * 3
    assert {name: len(taken) for name, taken in turns.seconds.items()} == {"a": 2, "b": 2}
    assert all(0.02 <= taken < 5 for each in turns.seconds.values() for taken in each)


def test_a_failure_lets_the_others_end_and_is_raised() -> None:
    ended: list[str] = []

    def fails(turns: Any) -> None:
        raise KeyError("no such sample")

    def goes_on(turns: Any) -> None:
        turns.next_turn("b")
        ended.append("b")

    with pytest.raises(RuntimeError) as failure:
        training.in_turns({"a": fails, "b": goes_on}, threads=1)
    assert isinstance(failure.value.__cause__, KeyError)
    assert ended == ["b"]


@pytest.mark.parametrize(("stage", "kept"), [(1, True), (2, False)])
def test_both_sides_of_a_stage_are_timed(
    recipe: RetrofitRecipe, stage: int, kept: bool, tmp_path: Path
) -> None:
    taken = training.step_seconds(recipe, stage, kept=kept, threads=1, folder=tmp_path)
    assert {name: len(seconds) for name, seconds in taken.items()} == {
        training.GUARDED: 2,
        training.PLAIN: 2,
    }
    assert all(second > 0 for seconds in taken.values() for second in seconds)


def test_the_table_has_a_line_for_each_stage_and_thread_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(
        recipe: RetrofitRecipe, stage: int, *, kept: bool, threads: int, folder: Path
    ) -> dict[str, list[float]]:
        return {training.GUARDED: [0.6, 0.6], training.PLAIN: [0.5, 0.5]}

    monkeypatch.setattr(training, "step_seconds", seconds)
    result = CliRunner().invoke(training.main, ["--threads", "1", "--threads", "2"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[-4:] == [
        f"| {stage} | {threads} | 600 | 500 | 1.20 (1.20–1.20) |"
        for threads in (1, 2)
        for stage in (1, 2)
    ]
