"""What was guarded on proof is loaded on proof, and not without one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.families import registration
from vqguard.adapters.proof.conformance import check
from vqguard.adapters.proof.guarded_subject import REFUSAL
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.registry import declared_family
from vqguard.adapters.storage.card import model_card
from vqguard.adapters.storage.trainer_checkpoints import restore_guarded
from vqguard.errors import ChecksumError, SeamError
from vqguard.safety_map import SafetyMap

Found = tuple[Any, dict[str, Any]]


class MysteryConfig(LlavaConfig):
    model_type = "mystery"


class MysteryModel(LlavaForConditionalGeneration):
    config_class = MysteryConfig


AutoConfig.register("mystery", MysteryConfig, exist_ok=True)
AutoModelForImageTextToText.register(MysteryConfig, MysteryModel, exist_ok=True)


def mystery() -> Found:
    """A model of a type that transformers was taught and no adapter names."""
    known = build_tiny("llava")
    inputs = make_inputs(known, (1, 2))
    fields = known.config.to_dict()
    fields.pop("model_type")
    model: Any = MysteryModel(MysteryConfig(**fields))
    model.load_state_dict(known.state_dict())
    model.generation_config = known.generation_config
    return model.eval(), inputs


def guarded(model: Any, inputs: dict[str, Any]) -> Any:
    guard = build_guard(model, patch_codes=24, semantic_codes=4, search="torch")
    counts = torch.tensor([[3, 0], [0, 3], [3, 0], [0, 3]])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    return guard_model(model, guard, refusal_ids=REFUSAL, probe_inputs=inputs)


def unproven(monkeypatch: pytest.MonkeyPatch) -> Found:
    """A model whose adapter was not proven on this transformers."""
    model = build_tiny("llava")
    newer = replace(declared_family("llava"), proven_from="5.999")
    monkeypatch.setitem(registration._FAMILIES, "llava", newer)
    return model, make_inputs(model, (1, 2))


CASES: dict[str, Callable[[pytest.MonkeyPatch], Found]] = {
    "unknown": lambda _: mystery(),
    "unproven": unproven,
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_with_a_proof(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = CASES[case](monkeypatch)
    guarded(model, inputs).save_pretrained(tmp_path)
    with pytest.raises(SeamError, match=r"or probe_inputs, what the processor returns"):
        load_guarded(tmp_path)
    again = load_guarded(tmp_path, probe_inputs=inputs)
    assert type(again).__mro__[1:3] == type(model).__mro__[1:3]
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.screen(**inputs) == model.screen(**inputs)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))
    again.save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((folder / "vqguard.json").read_text())
        for folder in (tmp_path, tmp_path / "second")
    )
    for manifest in (first, second):  # transformers writes the dtype of each part that was loaded
        del manifest["files"]["config.json"]
    assert first == second


def test_without_a_proof_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = mystery()
    guarded(model, inputs).save_pretrained(tmp_path)
    monkeypatch.setattr("vqguard.adapters.guarding.load_parts", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SeamError, match="no adapter names the model type 'mystery'"):
        load_guarded(tmp_path)


def test_a_proof_that_fails_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = mystery()
    guarded(model, inputs).save_pretrained(tmp_path)
    inner = type(model.model).vqguard_original
    forward = inner.forward

    @functools.wraps(forward)
    def leaky(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if kwargs.get("pixel_values") is not None:
            output.last_hidden_state = output.last_hidden_state + kwargs["pixel_values"].mean()
        return output

    monkeypatch.setattr(inner, "forward", leaky)
    with pytest.raises(SeamError, match="leaks around the guard"):
        load_guarded(tmp_path, probe_inputs=inputs)


def test_a_changed_projector_is_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, inputs = mystery()
    guarded(model, inputs).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "guarded.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "guarded.safetensors", metadata={"format": "pt"})
    with pytest.raises(ChecksumError, match="the weights"):
        load_guarded(tmp_path, probe_inputs=inputs)


def test_a_guard_without_its_base(tmp_path: Path) -> None:
    model, inputs = mystery()
    model.save_pretrained(tmp_path / "base")
    guarded(model, inputs)
    save_guard_only(model, tmp_path / "alone", tmp_path / "base")
    with pytest.raises(SeamError, match="pass its processor"):
        load_guarded(tmp_path / "alone", base=tmp_path / "base")
    again = load_guarded(tmp_path / "alone", base=tmp_path / "base", probe_inputs=inputs)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert "base=FOLDER_OF_THE_BASE, probe_inputs=INPUTS)" in model_card(tmp_path / "alone")


def test_a_trainer_s_checkpoint_goes_into_a_model_that_was_proven(tmp_path: Path) -> None:
    model, inputs = mystery()
    guarded(model, inputs).save_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.vqguard.safety_map = None
    assert restore_guarded(model, tmp_path)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert model.vqguard.safety_map is not None


def test_the_kit_runs_on_an_unknown_type() -> None:
    model, inputs = mystery()
    found = check(model, inputs)
    assert found.passed, str(found)
    assert {one.name: one.status for one in found.results}["storage"] == "passed"
