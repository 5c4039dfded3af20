"""The plan: memory by part, what lowers it, and that the step it counts is the step that runs."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vqguard.recipes.planning import step_peak as plan_peak
from vqguard.recipes.planning.live_bytes import LiveBytes
from vqguard.recipes.planning.meta_model import choose_trained, meta_model
from vqguard.recipes.planning.plan import RetrofitPlan, parse_memory, plan
from vqguard.recipes.planning.text import format_plan
from vqguard.recipes.recipe import LoraRecipe, load_recipe
from vqguard.recipes.training.nf4 import frozen_linear
from vqguard.recipes.training.step import checkpointing_on

TINY = load_recipe("llava-tiny")


def planned(changes: list[str], **options: int) -> RetrofitPlan:
    return plan(TINY.override(changes), tokens=(80, 80), **options)


def test_live_bytes_follow_the_tensors() -> None:
    with LiveBytes() as live:
        one = torch.empty(10, 10, device="meta")
        two = one * 2
        view = two.view(100)
        assert live.now == 800
        del one, two
        gc.collect()
        assert live.now == 400
        del view
        gc.collect()
        assert (live.now, live.peak) == (0, 800)


def test_live_bytes_count_what_autograd_saves() -> None:
    layers = nn.Sequential(*[nn.Linear(64, 64, bias=False, device="meta") for _ in range(4)])
    x = torch.empty(1000, 64, device="meta")
    with LiveBytes() as live:
        layers(x).sum().backward()
    activations, gradients = 1000 * 64 * 4, 64 * 64 * 4
    # Three inputs are saved beside x; backward holds two gradients of activations at a time.
    assert 4 * activations <= live.peak <= 6 * activations + 4 * gradients


class Forgetful(LiveBytes):
    """Keeps no result: every operation is worked out again."""

    class Nothing(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            pass

    def __init__(self) -> None:
        super().__init__()
        self._results = self.Nothing()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_worked_out_once_is_what_would_be_worked_out_again(
    monkeypatch: pytest.MonkeyPatch, stage: int, checkpointing: bool
) -> None:
    def step() -> plan_peak.Step:
        meta = meta_model(TINY)
        choose_trained(meta, TINY.stage1 if stage == 1 else TINY.stage2, stage)
        if checkpointing:
            checkpointing_on(meta.model)
        shape = plan_peak.StepShape(2, 30, 16)
        return plan_peak.step_peak(
            meta.model.train(), meta.adapter, shape, stage=stage, accumulate=False
        )

    once = step()
    monkeypatch.setattr(plan_peak, "LiveBytes", Forgetful)
    assert step() == once


def test_results_with_a_storage_in_common_are_counted_once() -> None:
    x = torch.empty(6, 10, device="meta")
    with LiveBytes() as live:
        for _ in range(2):
            halves = torch.unsafe_chunk(x * 1, 2)
            flat = torch.ops.aten._unsafe_view(halves[0], [30])
            assert (flat.shape, live.now) == ((30,), 240)
            del halves, flat
            gc.collect()
    assert live.now == 0


def test_calls_that_differ_in_a_type_are_worked_out_each() -> None:
    x = torch.empty(4, dtype=torch.int64, device="meta")
    with LiveBytes():
        assert (x * 2).dtype == torch.int64
        assert (x * 2.0).dtype == torch.float32
        assert (x * True).dtype == torch.int64


def test_parts_of_a_plan() -> None:
    result = planned([])
    first, second = result.stages
    assert first.memory.optimiser == 8 * sum(first.trained.values())
    assert second.memory.gradients == 4 * sum(second.trained.values())
    assert first.trained.keys() == {"projector", "codebooks"}
    assert second.trained.keys() == {"language model"}
    for stage in result.stages:
        parameters = sum(stage.trained.values()) + sum(stage.frozen.values())
        assert stage.memory.weights + stage.memory.codebooks == 4 * parameters
        assert stage.memory.total == sum(vars(stage.memory).values())
    assert (first.steps, second.steps) == (63, 667)


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("stage2.gradient_checkpointing=true", {"activations"}),
        ("stage2.micro_batch=4", {"activations"}),
        ("stage2.lora={rank: 4, alpha: 8}", {"gradients", "optimiser"}),
    ],
)
def test_what_lowers_memory(setting: str, parts: set[str]) -> None:
    before, after = planned([]).stages[1].memory, planned([setting]).stages[1].memory
    lower = {part for part in vars(before) if getattr(after, part) < getattr(before, part)}
    assert parts <= lower


def test_activations_grow_with_the_batch() -> None:
    one, two, four = (
        planned([f"stage2.batch={n}"]).stages[1].memory.activations for n in (8, 16, 32)
    )
    # Linear: which part of the gradients is alive at the peak may differ, hence the tolerance.
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)


def test_bf16_halves_frozen_weights() -> None:
    before = planned([]).stages[0].memory
    after = planned(["stage1.bf16=true"]).stages[0].memory
    assert after.weights < 0.6 * before.weights
    assert after.codebooks == before.codebooks
    assert after.activations < before.activations


def test_4_bits_are_half_a_byte_for_frozen_linear_layers() -> None:
    lora = "stage2.lora={rank: 4, alpha: 8}"
    meta = meta_model(TINY)
    sizes = [
        meta.model.get_submodule(n).weight.numel() for n in frozen_linear(meta.model, meta.adapter)
    ]
    for stage, others in ((1, []), (2, [lora])):
        whole, packed = (
            planned([*others, *nf4]).stages[stage - 1].memory
            for nf4 in ([], [f"stage{stage}.nf4=true"])
        )
        saved = whole.weights - packed.weights
        assert saved == pytest.approx(
            4 * sum(sizes) - 0.516 * sum(sizes) - 4 * max(sizes), rel=0.01
        )
        assert packed.optimiser == whole.optimiser


def test_what_does_not_fit_says_what_to_change() -> None:
    whole = planned([])
    limit = whole.stages[1].memory.total - 1
    result = replace(TINY, stage2=replace(TINY.stage2))
    found = plan(result, limit=limit, tokens=(80, 80))
    assert not found.fits(found.stages[1])
    changes = found.changes[2]
    assert changes[-1].total <= limit
    text = format_plan(found)
    assert "DOES NOT FIT" in text
    assert f"--set {changes[-1].settings[0]}" in text
    # Each is taken by the recipe as it is written, and does what the plan says.
    again = plan(TINY.override(changes[-1].settings), limit=limit, tokens=(80, 80))
    assert again.stages[1].memory.total == changes[-1].total
    assert again.fits(again.stages[1])


def test_what_never_fits_is_told_so() -> None:
    found = plan(TINY, limit=10**6, tokens=(80, 80))
    assert "more memory" in format_plan(found)


@pytest.mark.slow
def test_what_does_not_fit_one_device_is_sharded() -> None:
    large = load_recipe("llava-1.5").override(["stage2.lora=null"])
    stage = plan(large, limit=parse_memory("80GB")).stages[1]
    assert stage.memory.total > 80e9
    shards = RetrofitPlan(large, 1, parse_memory("80GB"), ()).shards(stage.memory.total, stage)
    assert shards is not None
    assert 2 <= shards <= 4


def test_more_devices_hold_less_of_the_batch() -> None:
    one, two = planned([], gpus=1).stages[0], planned([], gpus=2).stages[0]
    assert (one.micro_batch, two.micro_batch) == (64, 32)
    assert two.memory.activations < one.memory.activations
    assert one.steps == two.steps


def test_a_processor_holds_two_batches_and_what_its_heap_retains() -> None:
    pixels = ["features.cache=false"]
    cpu, gpu = (planned(pixels, gpus=n).stages[0].memory for n in (0, 1))
    assert cpu.inputs == 2 * gpu.inputs == 2 * 4 * 64 * 3 * 96 * 96
    assert cpu.retained > 0
    assert gpu.retained == 0
    kept = planned(["features.cache=true"], gpus=1).stages[0].memory
    assert kept.inputs == 4 * 64 * 37 * 192


def test_lora_counts_are_of_low_rank_updates() -> None:
    recipe = replace(TINY, stage2=replace(TINY.stage2, lora=LoraRecipe(rank=4, alpha=8)))
    (_, second) = plan(recipe, tokens=(80, 80)).stages
    width, mlp, layers = 192, 512, 4
    assert second.trained == {
        "low-rank adapters": layers * 4 * (4 * (width + width) + 3 * (width + mlp))
    }


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24 gib", 24 * 2**30), ("1.5", 15 * 10**8)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "nan", "24 apples"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  float's own words
        parse_memory(text)


def test_layers_spread_over_gpus_share_weights_and_not_the_batch() -> None:
    recipe = load_recipe("llava-1.5")
    alone, spread = plan(recipe), plan(recipe.override(["device_map=auto"]), gpus=4)
    for one, several in zip(alone.stages, spread.stages, strict=True):
        assert (several.micro_batch, several.accumulation) == (one.micro_batch, one.accumulation)
        memory = vars(several.memory)
        shared = {"weights", "gradients", "optimiser"}
        assert all(memory[part] == -(-getattr(one.memory, part) // 4) for part in shared)
        assert all(memory[part] == getattr(one.memory, part) for part in memory.keys() - shared)
    text = format_plan(spread)
    assert "x 1 GPU" in text
    assert "layers spread over 4 GPUs" in text
    small = format_plan(plan(recipe.override(["device_map=auto"]), gpus=4, limit=10**9))
    assert "spread over more GPUs" in small
    assert "FSDP" not in small
