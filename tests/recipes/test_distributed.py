"""Two gloo processes, under DDP, FSDP2 and DeepSpeed, train what one process trains."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from vqguard.adapters import load_guarded
from vqguard.errors import ConfigError, TrainingError
from vqguard.recipes import processes as processes_module
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training import batches as batches_module
from vqguard.recipes.training.arguments import training_arguments
from vqguard.recipes.training.batches import SharedBatches, by_length, shares
from vqguard.recipes.training.engines.deepspeed import prepare_partitions
from vqguard.recipes.training.engines.fsdp import fill, prepare_sharding, skeleton_of
from vqguard.recipes.training.progress import read_steps

HERE = Path(__file__).parent
ENGINES = Path(processes_module.__file__).parent / "engines"
RUNS = [
    (engine, kind)
    for engine in ("ddp", "fsdp", "deepspeed")
    for kind in ("", "_stopped", "_micro", "_lora", "_codes")
] + [("ddp", "_nf4"), ("deepspeed", "_nf4")]


def seen_from(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(batches_module, "rank_and_world", lambda: (rank, world))


def steps_of(
    monkeypatch: pytest.MonkeyPatch, world: int, micro: int, epoch: int = 0
) -> list[list[int]]:
    """The samples of each step of 22 samples in steps of 8, process by process."""
    each = []
    for rank in range(world):
        seen_from(monkeypatch, rank, world)
        batches = SharedBatches(22, 8, micro, seed=3)
        batches.epoch = epoch
        lists = list(batches)
        assert len(lists) == len(batches)
        assert batches.steps == 3
        times = -(-8 // (world * micro))
        each.append([chained(lists[i : i + times]) for i in range(0, len(lists), times)])
    return [chained(parts) for parts in zip(*each, strict=True)]


def chained(lists: Iterable[list[int]]) -> list[int]:
    return [*chain.from_iterable(lists)]


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (1, 2), (2, 4), (2, 2), (4, 1)])
def test_a_step_is_the_same_samples_however_it_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, world: int, micro: int
) -> None:
    alone = steps_of(monkeypatch, 1, 8)
    assert sorted(chained(alone)) == list(range(22))
    shared = steps_of(monkeypatch, world, micro)
    left_out = 6 % world
    assert shared[:2] == alone[:2]
    assert shared[2] == alone[2][: 6 - left_out]
    assert steps_of(monkeypatch, 1, 8, epoch=1) != alone


def test_more_processes_than_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_from(monkeypatch, 0, 4)
    with pytest.raises(ConfigError, match="3 samples"):
        SharedBatches(3, 8, 2, seed=0)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=6))
def test_a_step_is_cut_where_lengths_differ(lengths: list[list[int]]) -> None:
    step = [[{"input_ids": [0] * length} for length in batch] for batch in lengths]
    cut = by_length(step)
    before, after = ([*chain.from_iterable(way)] for way in (step, cut))
    assert [len(batch) for batch in cut] == [len(batch) for batch in step]
    assert {id(example) for example in after} == {id(example) for example in before}
    if len(step) > 1:
        longest = [len(example["input_ids"]) for example in after]
        assert longest == sorted(longest, reverse=True)
    else:
        assert after == before  # its order, and so its rounding, stays


def test_shares_weigh_answer_tokens_and_samples() -> None:
    labels = torch.full((3, 5), -100)
    labels[0, :4] = 1
    short = torch.full((1, 2), -100)
    short[0, 0] = 1
    one, two = shares([{"labels": labels}, {"labels": short}], torch.device("cpu"))
    assert (one.tokens, two.tokens) == pytest.approx((2 * 4 / 5, 2 * 1 / 5))
    assert (one.samples, two.samples) == pytest.approx((2 * 3 / 4, 2 * 1 / 4))
    (alone,) = shares([{"labels": labels}], torch.device("cpu"))
    assert (alone.tokens, alone.samples) == (1.0, 1.0)


def test_a_precision_that_the_recipe_does_not_ask_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="mixed_precision"):
        training_arguments(StageRecipe(samples=8), tmp_path, seed=0, devices=1, steps=1)


def test_a_skeleton_is_filled_with_what_was_trained(small_guarded: Any) -> None:
    model, _ = small_guarded()
    skeleton: Any = skeleton_of(model)
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    model.vqguard.patch.codebook.counts += 3
    fill(skeleton, model)
    for (name, one), two in zip(model.named_parameters(), skeleton.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one is not two
    assert skeleton.vqguard.patch.codebook.counts.tolist() == [3] * 32
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(skeleton(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", sorted(p.stem for p in ENGINES.glob("*.yaml")))
def test_accelerate_reads_the_engines_files(name: str) -> None:
    config = load_config_from_file(str(ENGINES / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed-zero2": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name]
    assert config.mixed_precision == "no"
    if name == "fsdp":
        fields = {k.removeprefix("fsdp_"): v for k, v in config.fsdp_config.items()}
        assert fields["version"] == 2
        assert fields["cpu_ram_efficient_loading"] is False
    if name == "deepspeed-zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_settings_of_fsdp_that_would_break_a_guard_are_refused() -> None:
    class Plugin:
        fsdp_version = 1
        state_dict_type = "SHARDED_STATE_DICT"
        activation_checkpointing = True

    with pytest.raises(ConfigError, match=r"version.*state_dict_type.*gradient_checkpointing"):
        prepare_sharding(Plugin(), torch.nn.Linear(1, 1))


class ZeroPlugin:
    def __init__(self, stage: int) -> None:
        self.zero_stage = stage
        self.deepspeed_config: dict[str, Any] = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [0, 3])
def test_zero_stages_that_have_no_copies_or_cut_codebooks_are_refused(stage: int) -> None:
    with pytest.raises(ConfigError, match=f"got {stage}"):
        prepare_partitions(ZeroPlugin(stage), bf16=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_bfloat16_under_deepspeed_is_autocast(bf16: bool) -> None:
    plugin = ZeroPlugin(2)
    prepare_partitions(plugin, bf16=bf16)
    wanted = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if bf16 else {}
    assert plugin.deepspeed_config == wanted


def test_fp16_under_deepspeed_is_refused() -> None:
    plugin = ZeroPlugin(2)
    plugin.deepspeed_config["fp16"] = {"enabled": True}
    with pytest.raises(ConfigError, match="fp16"):
        prepare_partitions(plugin, bf16=False)
    plugin.deepspeed_config["fp16"] = {"enabled": False}
    prepare_partitions(plugin, bf16=False)


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROGRAM = str(HERE / "stages_program.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One process, and two under an engine that a launcher started, from the same start."""
    folder = tmp_path_factory.mktemp("trained")
    begun: set[str] = set()

    def run(engine: str) -> Path:
        if engine == "deepspeed" and find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        for name, start in (("alone", []), (engine, LAUNCH)):
            if name not in begun:
                begun.add(name)
                done = launch(*start, PROGRAM, str(folder), name)
                assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


def like(kind: str) -> str:
    return f"alone{kind}" if kind in ("_lora", "_nf4", "_bf16") else "alone"


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), RUNS)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_report_the_losses_of_one(
    trained: Callable[[str], Path], engine: str, kind: str, stage: str
) -> None:
    folder = trained(engine)
    one = read_steps(folder / like(kind) / stage / "metrics.jsonl")
    two = read_steps(folder / f"{engine}{kind}" / stage / "metrics.jsonl")
    assert [line["step"] for line in one] == list(range(1, {"stage1": 6, "stage2": 3}[stage] + 1))
    assert len(two) == len(one)
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=1e-5, abs=1e-8), (first["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), RUNS)
def test_two_processes_end_with_the_weights_and_codes_of_one(
    trained: Callable[[str], Path], engine: str, kind: str
) -> None:
    folder, run = trained(engine), f"{engine}{kind}"
    one = load_file(folder / like(kind) / "result.safetensors")
    two = load_file(folder / run / "result.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(two[name], tensor, rtol=0, atol=1e-6), name
    codes = [json.loads((folder / n / "codes.json").read_text()) for n in (like(kind), run)]
    assert codes[0] == codes[1]
    assert len({code for image in codes[0] for code in image}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_a_stopped_run_of_two_ends_where_an_uninterrupted_one_does(
    trained: Callable[[str], Path], engine: str
) -> None:
    folder = trained(engine)
    whole = load_file(folder / engine / "result.safetensors")
    resumed = load_file(folder / f"{engine}_stopped" / "result.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_bf16_leaves_codebooks_in_float32(trained: Callable[[str], Path], engine: str) -> None:
    folder = trained(engine)
    one = load_file(folder / "alone_bf16" / "result.safetensors")
    two = load_file(folder / f"{engine}_bf16" / "result.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Gradients of bfloat16 products are summed in another order.
        assert torch.allclose(two[name].float(), tensor.float(), rtol=0, atol=1e-3), name
        if "codebook" in name:
            assert two[name].dtype == torch.float32
            assert not torch.equal(two[name].bfloat16().float(), two[name]), name


@pytest.mark.slow
def test_what_fsdp_trained_is_saved_whole(trained: Callable[[str], Path]) -> None:
    folder = trained("fsdp")
    model = load_guarded(folder / "fsdp" / "model")
    expected = load_file(folder / "fsdp" / "result.safetensors")
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(
    trained: Callable[[str], Path],
) -> None:
    folder = trained("ddp")
    # Without a launcher that would end them: the first process must notice by itself.
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(folder), "ddp", "die"],
            env={**ENVIRONMENT, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert runs[1].wait(1800) == -signal.SIGKILL
    noticed = time.monotonic()
    _, said = runs[0].communicate(timeout=120)
    assert time.monotonic() - noticed < 60
    assert runs[0].returncode == 1
    assert "another process of this run has ended" in said
    assert "--resume" in said
    done = launch(*LAUNCH, PROGRAM, str(folder), "ddp", "resume")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_file(folder / "ddp" / "result.safetensors")
    resumed = load_file(folder / "ddp_dead" / "result.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_nothing_is_lost_in_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes_module, "_join", lambda: None)
    monkeypatch.setattr(processes_module, "_leave", lambda: None)
    with (
        pytest.raises(TrainingError, match=r"another process .* --resume"),
        processes_module.together(),
    ):
        raise RuntimeError("Read error [127.0.0.1]:25990: Connection reset by peer.")
    with pytest.raises(RuntimeError, match="a bug"), processes_module.together():
        raise RuntimeError("a bug")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with (
        pytest.raises(ConfigError, match="cpu_ram_efficient_loading"),
        processes_module.together(),
    ):
        pass
