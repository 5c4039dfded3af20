"""A guarded checkpoint opens with its guard, or not at all, whatever loader is tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from vqguard.adapters import (
    build_guard,
    guard_model,
    load_guarded,
    save_guard_only,
    unguard_model,
)
from vqguard.errors import ArtefactError, ConfigError
from vqguard.recipes.tiny.weights import load_base

Make = Callable[..., Any]
PROGRAM = Path(__file__).with_name("loaders_program.py")
# These refuse any folder that is no model of theirs, and look no further than its configuration.
OTHER_REASONS = (
    "Unrecognized configuration class",
    "is not supported",
    "_model_mapping",
    "adapter_config.json",
)


def results(order: str, *folders: Path) -> dict[str, dict[str, str]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), order, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(folder).name: tried for folder, tried in found.items()}


@pytest.fixture
def folders(make_guarded: Make, make_llava: Make, make_inputs: Make, tmp_path: Path) -> list[Path]:
    """One of each kind of folder that a guarded model is written into."""
    make_llava().save_pretrained(tmp_path / "base")
    model = make_guarded(model=LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    save_guard_only(model, tmp_path / "alone", tmp_path / "base")
    inputs = make_inputs((1,))
    sample = {"input_ids": inputs["input_ids"][0], "pixel_values": inputs["pixel_values"][0]}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True
    )
    data: Any = [{**sample, "labels": sample["input_ids"]}]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.save_model(str(tmp_path / "trainer"))
    wrapped: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    save_guard_only(wrapped, tmp_path / "alone-lora", tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    names = ("whole", "sharded", "alone", "alone-lora", "trainer", "adapter")
    return [tmp_path / name for name in names]


@pytest.mark.alone
def test_without_the_package_nothing_opens(folders: list[Path]) -> None:
    found = results("without", *folders, folders[3] / "lora")
    assert len(found) == 7
    for folder, tried in found.items():
        opened = {name: said for name, said in tried.items() if ": " not in said[:40]}
        assert not opened, (folder, opened)
        for name, said in tried.items():
            assert not said.startswith("opened"), (folder, name, said)
            if folder not in ("adapter", "lora") and not any(r in said for r in OTHER_REASONS):
                assert "vqguard" in said, (folder, name, said)


@pytest.mark.alone
@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_with_the_package_they_open_guarded_or_not_at_all(order: str, tmp_path: Path) -> None:
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    model.save_pretrained(tmp_path, processor=processor, max_shard_size="500KB")
    (tried,) = results(order, tmp_path).values()
    assert tried["AutoConfig"] == "opened: LlavaConfig"
    for name in ("AutoModelForImageTextToText", "pipeline image-text-to-text"):
        assert tried[name] == "guarded", tried[name]
    others = {n: said for n, said in tried.items() if n != "AutoConfig" and said != "guarded"}
    for name, said in others.items():
        assert not said.startswith("opened"), (name, said)
        assert "vqguard" in said or any(r in said for r in OTHER_REASONS), (name, said)


def test_auto_classes_give_the_model_that_was_saved(
    make_guarded: Make, make_inputs: Make, tmp_path: Path
) -> None:
    model, inputs = make_guarded(flag=(1, 3)), make_inputs((1, 2))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlavaConfig)
    again: Any = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert LlavaForConditionalGeneration in type(again).__mro__
    assert type(again.config) is LlavaConfig
    assert not hasattr(again.config, "transformers_weights")
    assert again.screen(pixel_values=inputs["pixel_values"]) == model.screen(
        pixel_values=inputs["pixel_values"]
    )
    loads: list[Any] = [AutoModel.from_pretrained, LlavaForConditionalGeneration.from_pretrained]
    for load in loads:
        with pytest.raises(ValueError, match="open-with-vqguard"):
            load(tmp_path)
    with pytest.raises(ConfigError, match="random weights"):
        AutoModelForImageTextToText.from_config(config)
    for kwargs in ({"trust_remote_code": True}, {"use_safetensors": False}, {"subfolder": "x"}):
        with pytest.raises((ValueError, OSError)):
            AutoModelForImageTextToText.from_pretrained(tmp_path, **kwargs)
    # Other models are what they were to transformers.
    unguard_model(again).save_pretrained(tmp_path / "plain")
    plain: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
    assert type(plain) is LlavaForConditionalGeneration


def test_a_closed_configuration_of_nothing_is_refused(tmp_path: Path) -> None:
    for base in (None, {}, {"model_type": "vqguard"}, {"model_type": "no-such-type"}):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "vqguard", "base_config": base})
        )
        with pytest.raises(ArtefactError, match=r"closed by vqguard|no-such-type"):
            AutoConfig.from_pretrained(tmp_path)


def test_other_ways_of_writing_are_refused(make_guarded: Make, tmp_path: Path) -> None:
    for kwargs in ({"variant": "fp16"}, {"distributed_checkpoint": True}):
        with pytest.raises(ConfigError, match="other loaders find"):
            make_guarded().save_pretrained(tmp_path, **kwargs)
    model = make_guarded()
    model._hf_peft_config_loaded = True  # as add_adapter sets it
    with pytest.raises(ConfigError, match="that alone"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_base_comes_back(make_llava: Make, make_guarded: Make) -> None:
    plain = make_llava()
    plain.name_or_path = "somewhere"
    model = make_guarded(model=plain)
    assert model.name_or_path == "vqguard.guard_model:somewhere"
    assert unguard_model(model).name_or_path == "somewhere"


def test_a_kernel_named_in_a_configuration_is_not_fetched(
    make_guarded: Make, tmp_path: Path
) -> None:
    make_guarded().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    for changed in (
        {"attn_implementation": "someone/kernel"},
        {"text_config": {**document["base_config"]["text_config"], "_attn_implementation": "a/b"}},
        {"_experts_implementation": {"": "a/b@main"}},
    ):
        path.write_text(
            json.dumps({**document, "base_config": {**document["base_config"], **changed}})
        )
        with pytest.raises(ArtefactError, match="code on a hub"):
            load_guarded(tmp_path, allow_changed=("config.json",))


def test_an_engine_that_goes_by_architectures_finds_no_class(
    make_guarded: Make, tmp_path: Path
) -> None:
    """vLLM does, and would take the weights of any name."""
    make_guarded().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LlavaConfig)
    assert config.architectures == ["VQGuardedLlavaForConditionalGeneration"]
