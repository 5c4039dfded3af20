"""Weights that accelerate keeps elsewhere (on the CPU, a disk) until the `forward` that needs them.

Its hooks see `forward` alone. The guard reads its codebooks outside of any, and asks a model for
its visual features before `forward` runs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.errors import SeamError

_LOCK = threading.Lock()


def bring_back(guard: nn.Module) -> None:
    """Take an off-loaded guard out of accelerate's hands, to the device that it computes on.

    It stays there: verdicts need all of it, and it is small beside the model.

    Raises:
        SeamError: where accelerate does not have its weights any more.
    """
    if not _elsewhere(guard.modules()):
        return
    with _LOCK:
        hooked = [module for module in guard.modules() if hasattr(module, "_hf_hook")]
        if not hooked or not _elsewhere(guard.modules()):  # or another thread was here
            return
        devices = [_device(module) for module in hooked]
        for module in hooked:
            _unhook(module)
        if _elsewhere(guard.modules()):
            raise SeamError(
                "expected accelerate to hold the guard's weights that it off-loaded, found none: "
                "off-load the model first (device_map=..., dispatch_model, cpu_offload), then call "
                "guard_model"
            )
        guard.to(next((device for device in devices if device is not None), torch.device("cpu")))


@contextmanager
def at_hand(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, weights that these modules hold themselves are where they compute.

    Raises:
        SeamError: where a module inside reads off-loaded weights that accelerate did not bring.
            Mllama asks its patch embedding's weight for a device before that module's `forward`.
    """
    fetched = [module for module in modules if hasattr(module, "_hf_hook") and _elsewhere([module])]
    for module in fetched:
        _hook(module).pre_forward(module)
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if re.search(r"\bmeta\b", str(error)) is None:
            raise
        raise SeamError(
            "the vision encoder reads weights that are off-loaded outside of the forward that "
            f"brings them, guarded or not ({error}): off-load the language model alone, with a "
            "device_map that keeps the vision encoder where it computes"
        ) from error
    finally:
        for module in reversed(fetched):
            _hook(module).post_forward(module, None)


def _elsewhere(modules: Iterable[nn.Module]) -> bool:
    """Whether a tensor that one of the modules itself holds has no data here."""
    return any(tensor.is_meta for module in modules for tensor in _own(module))


def _own(module: nn.Module) -> Iterator[Tensor]:
    held = chain(module._parameters.values(), module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


def _hook(module: nn.Module) -> Any:
    return module.__dict__["_hf_hook"]


def _device(module: nn.Module) -> torch.device | None:
    parts = getattr(_hook(module), "hooks", [_hook(module)])
    places = (getattr(part, "execution_device", None) for part in parts)
    place = next((place for place in places if place is not None), None)
    return None if place is None else torch.device(place)


def _unhook(module: nn.Module) -> None:
    _hook(module).detach_hook(module)
    # What `add_hook_to_module` set on the instance; the class's own `forward` is what it hid.
    for name in ("_hf_hook", "_old_forward", "forward"):
        module.__dict__.pop(name, None)
