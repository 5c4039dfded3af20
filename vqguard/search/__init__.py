"""Nearest codeword: exact, and the same in every batch. See `base.CodewordSearch`.

Names are loaded when first used: a configuration reads the table of back ends without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; nothing is imported at run time
    from vqguard.search.base import CodewordSearch
    from vqguard.search.choose import make_search, needs_calibration, settled_calibration
    from vqguard.search.table import add_backend, backend_choices
    from vqguard.search.tuning import Calibration, calibrate

_HOMES = {
    "Calibration": "tuning",
    "CodewordSearch": "base",
    "add_backend": "table",
    "backend_choices": "table",
    "calibrate": "tuning",
    "make_search": "choose",
    "needs_calibration": "choose",
    "settled_calibration": "choose",
}

__all__ = [
    "Calibration",
    "CodewordSearch",
    "add_backend",
    "backend_choices",
    "calibrate",
    "make_search",
    "needs_calibration",
    "settled_calibration",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
