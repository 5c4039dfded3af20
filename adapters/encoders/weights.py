"""Weights of a plain encoder from a local file, without executing anything in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqguard.bounded import open_regular
from vqguard.errors import ArtefactError

_WRAPPERS = ("state_dict", "model", "model_state_dict")


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a `.safetensors` file or one that `torch.save` wrote.

    The latter is a pickle: it is read with `torch.load(weights_only=True)`, which builds tensors
    and containers and refuses everything else. Mappings such as {"state_dict": ...} are opened, and
    the prefix "module." that data-parallel training leaves is taken off.

    Raises:
        ArtefactError: for a file that is missing, unreadable or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file; expected weights as .safetensors, .pth or .pt")
    try:
        open_regular(path).close()  # a device would be read until memory ends
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ArtefactError(
            f"{path}: cannot be read as plain weights ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); nothing in it was executed. Save the state dict as "
            "safetensors"
        ) from error
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not state:
        raise ArtefactError(f"{path}: expected tensors by name, got {type(state).__name__}")
    strangers = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ArtefactError(
            f"{path}: {len(strangers)} entries are not tensors ({', '.join(strangers[:3])}); save "
            "the model's state dict alone"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `model`. Every name and shape must match, else `ArtefactError`.

    A guard around an encoder that is partly random would judge noise, so nothing is left out.
    """
    wanted = model.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not the model's" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" * (len(problems) > 4))
        raise ArtefactError(
            f"{source} does not fit {type(model).__name__}: {shown}. Use the weights of this very "
            "architecture"
        )
    model.load_state_dict(dict(tensors))
