"""Which devices a model lies on: this process's one, or all of them, layer by layer.

Spreading is Accelerate's: `from_pretrained(device_map=...)` chooses a device for every layer and
moves what goes from one to the next. Training then uses one device after another; several processes
(`docs/several-gpus.md`) use all at once, but each needs room for the whole model.
"""

from __future__ import annotations

from typing import Any

from vqguard.errors import ConfigError
from vqguard.recipes.processes import device, launched


def loading(device_map: str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that put a model's layers where the recipe wants them.

    Raises:
        ConfigError: several processes, each of which would spread the same model.
    """
    if device_map is None:
        return {}
    if launched() > 1:
        raise ConfigError(
            f"device_map={device_map} spreads one model over all devices, but {launched()} "
            "processes were launched: start one process, or leave device_map out"
        )
    return {"device_map": device_map}


def place(model: Any) -> Any:
    """`model` where this process computes; one that is spread over devices stays as it is."""
    return model if is_spread(model) else model.to(device())


def is_spread(model: Any) -> bool:
    """Whether Accelerate has given the model's layers their devices."""
    return getattr(model, "hf_device_map", None) is not None
