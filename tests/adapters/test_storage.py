"""Saving and loading is exact, and tampering is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqguard.adapters import load_guarded
from vqguard.errors import ArtefactError, ChecksumError, ConfigError

Make = Callable[..., Any]


@pytest.fixture
def saved(make_guarded: Make, tmp_path: Path) -> Path:
    make_guarded(flag=(1, 3)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("site", ["projected", "encoder"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_round_trip_is_exact(
    make_guarded: Make, make_inputs: Make, tmp_path: Path, site: str, shard: str
) -> None:
    model, inputs = make_guarded(flag=(1, 3), site=site), make_inputs((1, 2, 0))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    again = load_guarded(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    pixels = {"pixel_values": inputs["pixel_values"]}
    assert again.screen(**pixels) == model.screen(**pixels)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**inputs, **settings))
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    again.save_pretrained(tmp_path / "second")
    first, second = (
        json.loads((folder / "vqguard.json").read_text())
        for folder in (tmp_path, tmp_path / "second")
    )
    # transformers writes the dtype of each part of a model that was loaded; shards are as asked.
    for manifest in (first, second):
        del manifest["files"]["config.json"]
        manifest["files"].pop("guard/weights.safetensors.index.json", None)
    assert first == second


def test_base_files_are_the_usual_ones_under_their_own_names(
    make_llava: Make, saved: Path, tmp_path: Path
) -> None:
    make_llava().save_pretrained(tmp_path / "plain")
    for name, usual in (
        ("guarded.safetensors", "model.safetensors"),
        ("generation_config.json", "generation_config.json"),
    ):
        assert (saved / name).read_bytes() == (tmp_path / "plain" / usual).read_bytes()
    config = json.loads((saved / "config.json").read_text())["base_config"]
    del config["transformers_weights"]
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())


def test_dtype_may_change_on_loading(saved: Path, make_inputs: Make) -> None:
    model = load_guarded(saved, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.vqguard.patch.codebook.weight.dtype == torch.float32
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert model(**inputs).logits.isfinite().all()


def spoil_projector(folder: Path) -> None:
    path = folder / "guarded.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "multi_modal_projector.linear_2.bias" in key)
    tensors[key][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return spoil


TAMPERED: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "projector": (spoil_projector, ChecksumError),
    "guard.json": (spoil_json("guard/guard.json", map=None), ChecksumError),
    "guard tensors": (
        lambda f: (f / "guard/guard.safetensors").write_bytes(b"\0" * 64),
        ArtefactError,
    ),
    "guard gone": (lambda f: (f / "guard/guard.json").unlink(), ArtefactError),
    "manifest gone": (lambda f: (f / "vqguard.json").unlink(), ArtefactError),
    "manifest cut": (lambda f: (f / "vqguard.json").write_text('{"schema": 1'), ArtefactError),
    "schema": (spoil_json("vqguard.json", schema=99), ArtefactError),
    "unknown key": (spoil_json("vqguard.json", extra=1), ArtefactError),
    "value type": (spoil_json("vqguard.json", refusal_ids=["a"]), ArtefactError),
    "site": (spoil_json("vqguard.json", site="encoder"), ChecksumError),
    "weights damaged": (lambda f: (f / "guarded.safetensors").write_bytes(b"xx"), ArtefactError),
    "adapter smuggled in": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        ArtefactError,
    ),
    "index elsewhere": (
        lambda f: (f / "guard/weights.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "../other.safetensors"}}'
        ),
        ArtefactError,
    ),
    "weights gone": (lambda f: (f / "guarded.safetensors").unlink(), ArtefactError),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_refused(saved: Path, what: str) -> None:
    spoil, error = TAMPERED[what]
    spoil(saved)
    with pytest.raises(error):
        load_guarded(saved)


def test_a_manifest_is_refused_with_all_its_problems(saved: Path) -> None:
    path = saved / "vqguard.json"
    content = json.loads(path.read_text())
    content["guard_sha265"] = content.pop("guard_sha256")
    path.write_text(json.dumps({**content, "refusal_ids": [1, True], "site": None}))
    with pytest.raises(ArtefactError, match=r"vqguard\.json") as caught:
        load_guarded(saved)
    for problem in (
        "guard_sha265: unknown key. Did you mean 'guard_sha256'?",
        "guard_sha256: missing key",
        "refusal_ids[1]: expected int, got True (bool)",
        "site: expected str, got None (NoneType)",
    ):
        assert problem in str(caught.value)


def test_a_save_that_fails_leaves_what_was_there(
    make_guarded: Make, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_guarded()

    def stop(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(type(model.vqguard), "save_pretrained", stop)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(saved)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert load_guarded(saved).vqguard.safety_map is not None
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


def test_what_could_execute_is_refused(make_guarded: Make, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_guarded(saved, trust_remote_code=True)
    with pytest.raises(ConfigError, match="pickles"):
        load_guarded(saved, use_safetensors=False)
    with pytest.raises(ConfigError, match="pickles"):
        make_guarded().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="push_to_hub"):
        make_guarded().save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ArtefactError, match="no folder"):
        load_guarded("./nowhere")


def test_numbers_that_json_has_not_come_back(make_guarded: Make, tmp_path: Path) -> None:
    """transformers writes them as objects; some families have time steps without a limit."""
    model = make_guarded()
    model.config.text_config.limits = [0.0, math.inf]
    model.config.lowest = -math.inf
    model.save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    config = load_guarded(tmp_path).config
    assert (config.text_config.limits, config.lowest) == ([0.0, math.inf], -math.inf)
