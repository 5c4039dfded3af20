"""A guarded model that is loaded to judge: the same verdicts, and no language model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vqguard.adapters import build_guard, get_adapter, guard_model, load_guarded
from vqguard.adapters.features import Site
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.registry import is_known_type
from vqguard.adapters.storage.guard_only import save_guard_only
from vqguard.adapters.storage.weight_files import CLOSED_WEIGHTS
from vqguard.errors import SeamError

from .conftest import flagging_map

KINDS = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "blip-2", "mllama")


def guarded(kind: str, site: Site = "projected") -> Any:
    model = build_tiny(kind)
    guard = build_guard(model, site=site, patch_codes=24, semantic_codes=6, search="torch")
    guard.safety_map = flagging_map(guard, (0, 2, 4))
    return guard_model(model, guard)


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def language_numbers(model: Any) -> int:
    modules = get_adapter(model).language_modules(model)
    held = {p: p.numel() for module in modules for p in module.parameters()}
    return sum(held.values())


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_are_the_same_without_a_language_model(kind: str, tmp_path: Path) -> None:
    model = guarded(kind)
    model.save_pretrained(tmp_path)
    inputs = {k: v for k, v in make_inputs(model, (1, 1, 1)).items() if k not in ("input_ids",)}
    expected = load_guarded(tmp_path).screen(**inputs)
    judge = load_guarded(tmp_path, language=False)
    assert judge.screen(**inputs) == expected
    assert type(judge).__mro__[1:] == type(model).__mro__[1:]
    ends = [get_adapter(m).generation_config(m).eos_token_id for m in (judge, model)]
    assert ends[0] == ends[1]
    assert numbers(judge) == numbers(model) - language_numbers(model) > 0
    assert not any(parameter.is_meta for parameter in judge.parameters())
    assert not any(buffer.is_meta for buffer in judge.buffers())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*mapped_types()} - {*KINDS}))
def test_every_family_judges_without_or_is_loaded_whole(kind: str, tmp_path: Path) -> None:
    if not is_known_type(kind):
        pytest.skip("not proven on this transformers")
    try:
        model = guarded(kind)
    except SeamError as error:
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    inputs = {k: v for k, v in make_inputs(model, (1, 1)).items() if k not in ("input_ids",)}
    expected = load_guarded(tmp_path).screen(**inputs)
    judge = load_guarded(tmp_path, language=False)
    try:
        verdicts = judge.screen(**inputs)
    except Exception as error:  # `open_judge` loads such a family whole
        pytest.skip(f"needs its language model: {error}")
    assert verdicts == expected
    assert numbers(judge) in (numbers(model), numbers(model) - language_numbers(model))


def test_the_language_models_weights_are_not_loaded(
    make_guarded: Callable[..., Any], make_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    """It judges the same from a file that holds none of them."""
    model = make_guarded(flag=(0, 2, 4))
    model.save_pretrained(tmp_path)
    pixels = make_inputs((1, 1, 1))["pixel_values"]
    expected = load_guarded(tmp_path).screen(pixels)
    tensors = load_file(tmp_path / CLOSED_WEIGHTS)
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if "language_model" not in name and "lm_head" not in name
    }
    assert 0 < len(kept) < len(tensors)
    save_file(kept, tmp_path / CLOSED_WEIGHTS, metadata={"format": "pt"})
    judge = load_guarded(tmp_path, language=False, allow_changed={"weights"})
    assert judge.screen(pixels) == expected


def test_of_the_file_only_what_judges_is_read_into_the_model(
    make_guarded: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    model = make_guarded()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / CLOSED_WEIGHTS, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    read: list[list[int]] = []
    materialise = core_model_loading._materialize_copy

    def watched(tensor: Any, *args: Any, **options: Any) -> Any:
        read.append(tensor.get_shape())
        return materialise(tensor, *args, **options)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    load_guarded(tmp_path, language=False)
    language = ("language_model", "lm_head")
    judging = [shape for name, shape in shapes.items() if not any(n in name for n in language)]
    assert sorted(read) == sorted(judging)


def test_it_neither_answers_nor_is_saved(
    make_guarded: Callable[..., Any], make_inputs: Callable[..., Any], tmp_path: Path
) -> None:
    make_guarded(flag=()).save_pretrained(tmp_path / "whole")
    judge = load_guarded(tmp_path / "whole", language=False)
    inputs = make_inputs((1,))
    with pytest.raises(SeamError, match="left out"):
        judge.generate(**inputs, max_new_tokens=2)
    with pytest.raises(SeamError, match="left out"):
        judge(**inputs)
    with pytest.raises(SeamError, match="left out"):
        judge.save_pretrained(tmp_path / "part")
    with pytest.raises(SeamError, match="left out"):
        save_guard_only(judge, tmp_path / "part", tmp_path / "whole")
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_a_guard_without_its_base(
    make_llava: Callable[..., Any],
    make_guarded: Callable[..., Any],
    make_inputs: Callable[..., Any],
    tmp_path: Path,
    site: Site,
) -> None:
    base = make_llava()
    base.save_pretrained(tmp_path / "base")
    model = make_guarded(flag=(0, 2, 4), site=site, model=base)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(1.5)
    save_guard_only(model, tmp_path / "guard", tmp_path / "base")
    pixels = make_inputs((1, 1, 1))["pixel_values"]
    whole, judge = (
        load_guarded(tmp_path / "guard", base=tmp_path / "base", language=language)
        for language in (True, False)
    )
    assert judge.screen(pixels) == whole.screen(pixels)
    assert numbers(judge) == numbers(model) - language_numbers(model)
