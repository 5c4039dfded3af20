"""A guard without its base: exact on its own base, refused on any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vqguard.adapters import load_guarded, save_guard_only
from vqguard.adapters.storage.weight_files import weights_sha256
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, SeamError

Make = Callable[..., Any]


@pytest.fixture
def base(make_llava: Make, tmp_path: Path) -> Path:
    make_llava().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(model: Any, *parts: str) -> None:
    """Moves the parameters whose names hold one of `parts`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter += torch.randn(parameter.shape, generator=generator) / 4


@pytest.fixture
def trained(make_guarded: Make) -> Any:
    """A guarded model whose projector was trained, as stage 1 does it."""
    model = make_guarded(flag=(1, 3))
    train(model, "multi_modal_projector")
    return model


@pytest.fixture
def alone(trained: Any, base: Path, tmp_path: Path) -> Path:
    save_guard_only(trained, tmp_path / "alone", base)
    return tmp_path / "alone"


def test_it_holds_what_changed_and_nothing_else(trained: Any, alone: Path) -> None:
    assert sorted(load_file(alone / "changed.safetensors")) == [
        f"multi_modal_projector.linear_{layer}.{kind}"
        for layer in (1, 2)
        for kind in ("bias", "weight")
    ]
    assert sorted(path.name for path in alone.iterdir()) == [
        "changed.safetensors",
        "config.json",
        "generation_config.json",
        "guard",
        "vqguard.json",
    ]
    manifest = json.loads((alone / "vqguard.json").read_text())
    assert manifest["base"]["name"] == "base"
    assert str(alone.parent) not in (alone / "vqguard.json").read_text()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_on_its_base_it_is_the_model_that_was_saved(
    trained: Any, alone: Path, base: Path, make_llava: Make, make_inputs: Make, shard: str
) -> None:
    for path in base.glob("model*"):
        path.unlink()
    make_llava().save_pretrained(base, max_shard_size=shard)
    again, inputs = load_guarded(alone, base=base), make_inputs((1, 2, 0))
    state, expected = again.state_dict(), trained.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), trained.generate(**inputs, **settings))
    assert again.generation_config.eos_token_id == trained.generation_config.eos_token_id
    assert not again.training


def test_a_trained_language_model_is_kept_too(
    make_guarded: Make, base: Path, tmp_path: Path
) -> None:
    model = make_guarded()
    train(model, "multi_modal_projector", "language_model.layers.1.mlp", "lm_head")
    save_guard_only(model, tmp_path / "alone", base)
    state, expected = load_guarded(tmp_path / "alone", base=base).state_dict(), model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    names = load_file(tmp_path / "alone" / "changed.safetensors")
    assert "vision" not in "".join(names)
    assert len(names) == 4 + 3 + 1


def test_a_model_in_another_dtype_than_its_base(
    make_llava: Make, make_guarded: Make, base: Path, tmp_path: Path
) -> None:
    model = make_guarded(model=make_llava().bfloat16())
    train(model, "multi_modal_projector")
    save_guard_only(model, tmp_path / "alone", base)
    assert len(load_file(tmp_path / "alone" / "changed.safetensors")) == 4
    again = load_guarded(tmp_path / "alone", base=base)
    assert again.lm_head.weight.dtype == torch.bfloat16
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert load_guarded(tmp_path / "alone", base=base, dtype=torch.float32).dtype == torch.float32


def test_lora_weights_travel_beside_it(
    trained: Any, base: Path, tmp_path: Path, make_inputs: Make
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped: Any = get_peft_model(trained, config)
    save_guard_only(wrapped, tmp_path / "alone", base)
    assert sorted(path.name for path in (tmp_path / "alone" / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len(load_file(tmp_path / "alone" / "changed.safetensors")) == 4
    again, inputs = load_guarded(tmp_path / "alone", base=base), make_inputs((1, 1))
    assert not any("lora" in name for name in again.state_dict())
    merged = wrapped.eval().merge_and_unload()
    expected = merged.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert torch.equal(again(**inputs).logits, merged(**inputs).logits)
    path = tmp_path / "alone" / "lora" / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)
    with pytest.raises(ChecksumError, match="lora"):
        load_guarded(tmp_path / "alone", base=base)


def test_other_adapters_than_lora_are_refused(trained: Any, base: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(ConfigError, match="IA3"):
        save_guard_only(get_peft_model(trained, config), tmp_path / "alone", base)


def spoil(folder: Path, name: str, part: str) -> None:
    path = folder / name
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["vision_tower", "lm_head", "multi_modal_projector"])
def test_another_base_is_refused(alone: Path, base: Path, part: str) -> None:
    before = weights_sha256(base)
    spoil(base, "model.safetensors", part)
    assert weights_sha256(base) != before
    with pytest.raises(ChecksumError, match="not the base"):
        load_guarded(alone, base=base)


def test_a_local_base_must_be_named(alone: Path, base: Path, trained: Any) -> None:
    with pytest.raises(ArtefactError, match="base=FOLDER"):
        load_guarded(alone)
    trained.save_pretrained(alone.parent / "whole")
    with pytest.raises(ConfigError, match="whole model"):
        load_guarded(alone.parent / "whole", base=base)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return change


def smuggle(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{}")


TAMPERED: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "changed tensors": (lambda f: spoil(f, "changed.safetensors", "linear_1"), ChecksumError),
    "changed tensors gone": (lambda f: (f / "changed.safetensors").unlink(), ArtefactError),
    "config": (edit("config.json", vision_feature_layer=-1), ChecksumError),
    "guard": (edit("guard/guard.json", schema=1, extra=0), ChecksumError),
    "lora smuggled in": (lambda f: smuggle(f / "lora" / "adapter_config.json"), ArtefactError),
    "base": (edit("vqguard.json", base={"name": "x"}), ArtefactError),
    "base of a wrong type": (edit("vqguard.json", base="x"), ArtefactError),
    "merged keys": (edit("vqguard.json", schema=1), ArtefactError),
    "no manifest": (lambda f: (f / "vqguard.json").unlink(), ArtefactError),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_refused(alone: Path, base: Path, what: str) -> None:
    change, error = TAMPERED[what]
    change(alone)
    with pytest.raises(error):
        load_guarded(alone, base=base)


def test_what_cannot_be_saved(
    trained: Any, make_llava: Make, base: Path, alone: Path, tmp_path: Path
) -> None:
    with pytest.raises(SeamError, match="guarded"):
        save_guard_only(make_llava(), tmp_path / "x", base)
    trained.save_pretrained(tmp_path / "whole")
    with pytest.raises(ArtefactError, match="another model"):
        save_guard_only(trained, tmp_path / "whole", base)
    tensors = load_file(base / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match="lm_head"):
        save_guard_only(trained, alone, base)
    # A failed save leaves what was there: the guard of the base as it was.
    with pytest.raises(ChecksumError, match="not the base"):
        load_guarded(alone, base=base)


def test_llava_tiny_is_found_by_its_name(tmp_path: Path) -> None:
    from vqguard.adapters import build_guard, guard_model
    from vqguard.recipes.tiny.weights import load_base

    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    train(model, "multi_modal_projector")
    save_guard_only(model, tmp_path, "llava-tiny", processor=processor)
    assert len(load_file(tmp_path / "changed.safetensors")) == 4
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.*")) < 2**20
    expected, again = model.state_dict(), load_guarded(tmp_path).state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.items())
