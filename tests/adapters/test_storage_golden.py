"""Files that earlier versions wrote must load in this one.

`golden/merged-1` and `golden/guard-only-2` hold what `golden_model` was when their schemas were
new (transformers 5.24); `golden/base` is the base of the latter. They are never written again: a
new schema gets new folders. `golden/expected.safetensors` holds what the model answered then.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.storage.new_map import replace_map
from vqguard.errors import ChecksumError
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap

GOLDEN = Path(__file__).parent / "golden"
REFUSAL = (20, 21)
FOLDERS = ("merged-1", "guard-only-2")


def golden_base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(hidden_size=8, image_size=16, patch_size=8, **sizes)
    text = LlamaConfig(vocab_size=32, hidden_size=16, bos_token_id=0, eos_token_id=2, **sizes)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=30,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 1
    return model.eval()


def golden_model(base: Any) -> Any:
    guard = build_guard(
        base, patch_codes=12, semantic_codes=4, search="torch", refusal_text="Non, désolé."
    )
    counts = torch.tensor([[9, 1], [0, 5], [1, 7], [8, 0]])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    guard_model(base, guard, refusal_ids=REFUSAL)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.model.multi_modal_projector.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 2
    config = LoraConfig(r=1, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, config)


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[0, 30, 30, 30, 30, 7, 8, 9]] * 6)
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    scale = torch.linspace(0.3, 3, 6)[:, None, None, None]
    return {"input_ids": ids, "pixel_values": pixels * scale}


def answers(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        logits = model(**inputs()).logits
        said = model.generate(**inputs(), max_new_tokens=4, do_sample=False)
    flagged = torch.tensor([verdict.flagged for verdict in model.last_verdicts])
    return {"logits": logits, "sequences": said.contiguous(), "flagged": flagged}


def write_golden(folder: Path) -> None:
    """What made the folders, kept for the next schema."""
    golden_base().save_pretrained(folder / "base")
    model = golden_model(golden_base())
    save_guard_only(model, folder / "guard-only-2", folder / "base")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(folder / "merged-1")
    save_file(answers(merged), folder / "expected.safetensors")


def load(name: str, base: Path = GOLDEN / "base") -> Any:
    return load_guarded(GOLDEN / name, base=None if name.startswith("merged") else base)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_folder_loads_and_answers_as_it_did(name: str) -> None:
    model = load(name)
    expected, found = load_file(GOLDEN / "expected.safetensors"), answers(model)
    assert 0 < int(expected["flagged"].sum()) < len(expected["flagged"])
    assert torch.equal(found["flagged"], expected["flagged"])
    assert torch.equal(found["sequences"], expected["sequences"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert model.vqguard.config.refusal_text == "Non, désolé."
    assert model.vqguard.safety_map.counts.tolist() == [[9, 1], [0, 5], [1, 7], [8, 0]]


def test_both_golden_folders_hold_the_same_model() -> None:
    merged, alone = (load(name).state_dict() for name in FOLDERS)
    assert merged.keys() == alone.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(alone[key], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_schema_is_the_one_the_folder_is_named_after(name: str) -> None:
    manifest = json.loads((GOLDEN / name / "vqguard.json").read_text())
    assert manifest["schema"] == int(name.rpartition("-")[2])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_new_map_keeps_a_golden_folder_s_form(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    guard = VQGuard.from_pretrained(folder / "guard")
    counts = torch.tensor([[1, 9], [5, 0], [7, 1], [0, 8]])
    replace_map(folder, SafetyMap(("knife",), counts, codebook_checksum=guard.checksum("semantic")))
    before = json.loads((GOLDEN / name / "vqguard.json").read_text())
    after = json.loads((folder / "vqguard.json").read_text())
    assert {key for key in before if before[key] != after[key]} == {"guard_sha256"}
    base = None if name.startswith("merged") else GOLDEN / "base"
    assert load_guarded(folder, base=base).vqguard.safety_map.categories == ("knife",)


def test_the_golden_guard_is_refused_on_another_base(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ChecksumError, match="not the base"):
        load("guard-only-2", tmp_path / "base")
