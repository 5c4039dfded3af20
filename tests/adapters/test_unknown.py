"""Types that no adapter names are taken on proof alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel

from vqguard.adapters import build_guard, guard_model
from vqguard.adapters.base import Adapter
from vqguard.adapters.families import registration
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.registry import declared_family, get_adapter, is_known
from vqguard.errors import SeamError


def mystery() -> tuple[Any, dict[str, Any]]:
    """A LLaVA under a name that nobody knows."""
    model = build_tiny("llava")
    inputs = make_inputs(model, (1, 2))
    model.config.model_type = "mystery"
    assert not is_known(model)
    return model, inputs


def test_an_unknown_type_needs_a_proof_and_is_taken_with_one() -> None:
    model, inputs = mystery()
    assert type(get_adapter(model)) is DefaultAdapter
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    with pytest.raises(SeamError, match="pass its processor, or probe_inputs"):
        guard_model(model, guard)
    assert not hasattr(model, "vqguard")
    guard_model(model, guard, probe_inputs=inputs)
    assert model.vqguard is guard
    assert model(**inputs).logits.isfinite().all()


def test_an_unknown_type_that_leaks_is_refused_by_name() -> None:
    model, inputs = mystery()
    language = model.model.language_model
    seen: list[torch.Tensor] = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean()))
    language.register_forward_pre_hook(
        lambda _, args, kw: (args, {**kw, "inputs_embeds": kw["inputs_embeds"] + seen[-1]}),
        with_kwargs=True,
    )
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    with pytest.raises(SeamError, match=r"leaks around the guard.*language_model"):
        guard_model(model, guard, probe_inputs=inputs)
    assert type(model) is LlavaForConditionalGeneration
    assert type(model.model) is LlavaModel


def test_an_unknown_type_without_features_is_refused() -> None:
    model = build_tiny("blip")
    model.config.model_type = "mystery"
    with pytest.raises(SeamError, match="no adapter"):
        build_guard(model)


def test_the_base_adapter_finds_the_innermost_owner() -> None:
    model = build_tiny("qwen3_vl")
    assert [(s.path, s.modality) for s in Adapter().seams(model)] == [
        ("model", "image"),
        ("model", "video"),
    ]


def test_a_family_on_an_older_transformers_needs_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llava")
    newer = replace(declared_family("llava"), proven_from="5.999")
    monkeypatch.setitem(registration._FAMILIES, "llava", newer)
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    with pytest.raises(SeamError, match=r"proven from transformers 5\.999.*>=5\.999"):
        guard_model(model, guard)
    assert not hasattr(model, "vqguard")
    guard_model(model, guard, probe_inputs=make_inputs(model, (1, 2)))
    assert model.vqguard is guard


@pytest.mark.parametrize(
    ("version", "proven"),
    [("5.9.0", False), ("5.11.4", False), ("5.12.0", True), ("5.12.0.dev0", True), ("6.0.1", True)],
)
def test_versions_are_numbers(version: str, proven: bool) -> None:
    assert Family("llava", proven_from="5.12").is_proven(version) is proven
