"""Logits processors of both model runners of vLLM; its CPU build runs the first one here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vqguard.adapters.storage.manifest import read_manifest

from .conftest import WHY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason=WHY),
]
END = 2


def engine_of(folder: Path, *, guarded: bool = True) -> Any:
    """What vLLM tells a logits processor of its engine, as far as ours looks."""
    hf_config = SimpleNamespace(vqguard_closed=True) if guarded else SimpleNamespace()
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config, model=str(folder)))


def params(stamp: list[int] | None) -> Any:
    extra = None if stamp is None else {"vqguard": stamp}
    return SimpleNamespace(extra_args=extra, _eos_token_id=END, max_tokens=4)


def forced(logits: torch.Tensor) -> list[int | None]:
    """The one token that a row leaves, None where it leaves all."""
    kept = logits.isfinite()
    return [int(row.int().argmax()) if int(row.sum()) == 1 else None for row in kept]


def test_one_entry_point_serves_both_runners(llava_folder: Path) -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessor as First  # not everybody has it
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Second

    from vqguard.adapters.vllm_engine.forcing import ForcedAnswers, OfFirstRunner, OfSecondRunner

    assert issubclass(ForcedAnswers, First)
    assert issubclass(ForcedAnswers, Second)
    engine = engine_of(llava_folder)
    assert isinstance(ForcedAnswers(engine, torch.device("cpu"), False), OfFirstRunner)
    assert isinstance(ForcedAnswers(engine, SimpleNamespace()), OfSecondRunner)


def test_the_first_runner_forces_by_place_in_the_batch(llava_folder: Path) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from vqguard.adapters.vllm_engine.forcing import ForcedAnswers

    processor: Any = ForcedAnswers(engine_of(llava_folder), torch.device("cpu"), False)
    said: list[list[int]] = [[], [], []]
    added = [(0, params([7, 8]), [1], said[0]), (1, params([]), [1], said[1])]
    added.append((2, params(None), [1], said[2]))
    processor.update_state(BatchUpdate(3, [], added, []))
    refusal = read_manifest(llava_folder).refusal_ids
    assert forced(processor.apply(torch.zeros(3, 300))) == [7, None, refusal[0]]
    said[0].append(7)
    assert forced(processor.apply(torch.zeros(3, 300))) == [8, None, refusal[0]]
    processor.update_state(BatchUpdate(3, [], [], [(0, 1, MoveDirectionality.SWAP)]))
    assert forced(processor.apply(torch.zeros(3, 300))) == [None, 8, refusal[0]]
    said[0].append(8)
    assert forced(processor.apply(torch.zeros(3, 300)))[:2] == [None, None]


def test_the_second_runner_forces_by_slot(llava_folder: Path) -> None:
    from vqguard.adapters.vllm_engine.forcing import ForcedAnswers

    prompts = SimpleNamespace(np=np.array([5, 9, 4]))
    states = SimpleNamespace(prompt_len=prompts)
    processor: Any = ForcedAnswers(engine_of(llava_folder), states)
    assert processor.add_request(2, params([7, 8]))
    assert not processor.add_request(1, params([]))
    assert processor.add_request(0, params(None))
    refusal = read_manifest(llava_folder).refusal_ids

    def step(*lengths: int) -> list[int | None]:
        slots = np.array([2, 1, 0])
        ctx = SimpleNamespace(idx_mapping_np=slots, seq_lens_upper_bound_np=np.array(lengths))
        return forced(processor.apply(torch.zeros(3, 300), ctx))

    assert step(2, 9, 5) == [None, None, refusal[0]]  # the first has more of its prompt to read
    assert step(4, 9, 6) == [7, None, refusal[1]]
    assert step(5, 10, 7) == [8, None, refusal[2]]
    assert step(6, 11, 8)[:2] == [None, None]
    assert not processor.add_request(2, params([]))  # another request in the slot
    assert step(4, 9, 5)[0] is None


def test_an_engine_without_a_guard_is_left_alone(llava_folder: Path) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate

    from vqguard.adapters.vllm_engine.forcing import ForcedAnswers

    engine = engine_of(llava_folder, guarded=False)
    processor: Any = ForcedAnswers(engine, torch.device("cpu"), False)
    processor.update_state(BatchUpdate(1, [], [(0, params(None), [1], [])], []))
    assert forced(processor.apply(torch.zeros(1, 300))) == [None]
