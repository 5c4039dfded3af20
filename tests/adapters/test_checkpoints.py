"""Weight files are read, never executed, and fit entirely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vqguard.adapters.encoders.efficientnet_names import timm_names
from vqguard.adapters.encoders.weights import load_weights, read_state_dict
from vqguard.errors import ArtefactError


def test_every_form_of_a_state_dict_is_read(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pth", "c.pt"):
        model = nn.Linear(3, 2)
        load_weights(model, read_state_dict(tmp_path / name), name)
        assert torch.equal(model.weight, state["weight"])
        assert torch.equal(model.bias, state["bias"])


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_a_pickle_that_executes_is_refused_unexecuted(tmp_path: Path) -> None:
    file, place = tmp_path / "weights.pth", tmp_path / "executed"
    torch.save({"weight": torch.zeros(1), "more": Payload(place)}, file)
    with pytest.raises(ArtefactError, match="nothing in it was executed"):
        read_state_dict(file)
    assert not place.exists()
    torch.load(file, weights_only=False)  # the file is what it is said to be
    assert place.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [({"weight": 3}, "not tensors"), ([torch.zeros(1)], "list"), ({}, "by name")],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ArtefactError, match=message):
        read_state_dict(tmp_path / "x.pth")


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        read_state_dict(tmp_path / "none.pth")
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(b"PK nothing")
        with pytest.raises(ArtefactError, match=name):
            read_state_dict(tmp_path / name)


def test_nothing_is_left_random() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    good = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    for change, message in (
        ({"bias": None}, "bias is missing"),
        ({"extra": torch.zeros(1)}, "extra is not the model's"),
        ({"weight": torch.zeros(3, 2)}, r"weight is \(3, 2\)"),
    ):
        state = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(ArtefactError, match=message):
            load_weights(model, state, "file")
    assert torch.equal(model.weight, before)


def test_another_size_of_efficientnet_is_refused() -> None:
    with pytest.raises(ArtefactError, match="another size"):
        timm_names({"_blocks.3._bn1.weight": torch.zeros(1)}, nn.Linear(1, 1))
