"""A discrete bottleneck for multimodal language models.

Every visual token becomes a codeword before a language model sees it, and a semantic code is judged
by a safety map. Attributes are loaded when first used, so that `import vqguard` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; nothing is imported at run time
    from vqguard.adapters import (
        build_guard,
        get_adapter,
        guard_encoder,
        guard_model,
        load_guarded,
        save_guard_only,
        unguard_model,
    )
    from vqguard.codebook import Codebook
    from vqguard.config import GuardConfig, StrictConfig
    from vqguard.encoder import EncoderFeatures, GuardedEncoder, TokenEncoder
    from vqguard.errors import (
        ArtefactError,
        BypassError,
        ChecksumError,
        ConfigError,
        InputError,
        NonFiniteError,
        SeamError,
        TrainingError,
        VQGuardError,
    )
    from vqguard.guard import GuardLosses, GuardOutput, VQGuard, recording
    from vqguard.quantizer import Quantized, VectorQuantizer, straight_through, use_estimator
    from vqguard.safety_map import SafetyMap, Verdict
    from vqguard.search import make_search
    from vqguard.verdict_rules import VerdictRule, register_verdict_rule

    __version__: str

_HOMES = {
    "vqguard.adapters": (
        "build_guard",
        "get_adapter",
        "guard_encoder",
        "guard_model",
        "load_guarded",
        "save_guard_only",
        "unguard_model",
    ),
    "vqguard.codebook": ("Codebook",),
    "vqguard.config": ("GuardConfig", "StrictConfig"),
    "vqguard.encoder": ("EncoderFeatures", "GuardedEncoder", "TokenEncoder"),
    "vqguard.errors": (
        "ArtefactError",
        "BypassError",
        "ChecksumError",
        "ConfigError",
        "InputError",
        "NonFiniteError",
        "SeamError",
        "TrainingError",
        "VQGuardError",
    ),
    "vqguard.guard": ("GuardLosses", "GuardOutput", "VQGuard", "recording"),
    "vqguard.quantizer": ("Quantized", "VectorQuantizer", "straight_through", "use_estimator"),
    "vqguard.safety_map": ("SafetyMap", "Verdict"),
    "vqguard.search": ("make_search",),
    "vqguard.verdict_rules": ("VerdictRule", "register_verdict_rule"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArtefactError",
    "BypassError",
    "ChecksumError",
    "Codebook",
    "ConfigError",
    "EncoderFeatures",
    "GuardConfig",
    "GuardLosses",
    "GuardOutput",
    "GuardedEncoder",
    "InputError",
    "NonFiniteError",
    "Quantized",
    "SafetyMap",
    "SeamError",
    "StrictConfig",
    "TokenEncoder",
    "TrainingError",
    "VQGuard",
    "VQGuardError",
    "VectorQuantizer",
    "Verdict",
    "VerdictRule",
    "__version__",
    "build_guard",
    "get_adapter",
    "guard_encoder",
    "guard_model",
    "load_guarded",
    "make_search",
    "recording",
    "register_verdict_rule",
    "save_guard_only",
    "straight_through",
    "unguard_model",
    "use_estimator",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("vqguard")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'vqguard' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
