"""Where the guard sits in a given model. Everything is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter
    from vqguard.adapters.encoders import guard_encoder
    from vqguard.adapters.features import VisualFeatures
    from vqguard.adapters.guard_only import save_guard_only
    from vqguard.adapters.install import build_guard, guard_model, unguard_model
    from vqguard.adapters.link import encoder_features
    from vqguard.adapters.probe import ProbeResult, one_codeword_probe
    from vqguard.adapters.registry import (
        ModelEntry,
        get_adapter,
        list_models,
        register_adapter,
        resolve_model,
    )
    from vqguard.adapters.resume import GuardedCheckpoints
    from vqguard.adapters.storage import load_guarded

_HOMES = {
    "Adapter": "base",
    "VisualFeatures": "features",
    "build_guard": "install",
    "encoder_features": "link",
    "guard_encoder": "encoders",
    "guard_model": "install",
    "unguard_model": "install",
    "ProbeResult": "probe",
    "one_codeword_probe": "probe",
    "ModelEntry": "registry",
    "get_adapter": "registry",
    "list_models": "registry",
    "register_adapter": "registry",
    "resolve_model": "registry",
    "GuardedCheckpoints": "resume",
    "load_guarded": "storage",
    "save_guard_only": "guard_only",
}

__all__ = [
    "Adapter",
    "GuardedCheckpoints",
    "ModelEntry",
    "ProbeResult",
    "VisualFeatures",
    "build_guard",
    "encoder_features",
    "get_adapter",
    "guard_encoder",
    "guard_model",
    "list_models",
    "load_guarded",
    "one_codeword_probe",
    "register_adapter",
    "resolve_model",
    "save_guard_only",
    "unguard_model",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vqguard.adapters.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
