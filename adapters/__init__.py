"""Where the guard sits in a given model. Everything is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter
    from vqguard.adapters.catalogue import ModelEntry, list_models, resolve_model
    from vqguard.adapters.encoders.guard_encoder import guard_encoder
    from vqguard.adapters.features import VisualFeatures
    from vqguard.adapters.guarding import guard_model, load_guarded
    from vqguard.adapters.install import build_guard, unguard_model
    from vqguard.adapters.proof.probe import ProbeResult, one_codeword_probe
    from vqguard.adapters.registration import register_adapter
    from vqguard.adapters.registry import get_adapter
    from vqguard.adapters.runtime.guard_link import encoder_features
    from vqguard.adapters.runtime.quantise import visual_features
    from vqguard.adapters.storage.guard_only import save_guard_only
    from vqguard.adapters.storage.trainer_checkpoints import GuardedCheckpoints

_HOMES = {
    "Adapter": "base",
    "VisualFeatures": "features",
    "build_guard": "install",
    "encoder_features": "runtime.guard_link",
    "guard_encoder": "encoders.guard_encoder",
    "guard_model": "guarding",
    "unguard_model": "install",
    "ProbeResult": "proof.probe",
    "one_codeword_probe": "proof.probe",
    "ModelEntry": "catalogue",
    "get_adapter": "registry",
    "list_models": "catalogue",
    "register_adapter": "registration",
    "resolve_model": "catalogue",
    "GuardedCheckpoints": "storage.trainer_checkpoints",
    "load_guarded": "guarding",
    "save_guard_only": "storage.guard_only",
    "visual_features": "runtime.quantise",
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
    "visual_features",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vqguard.adapters.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
