"""Names that a package shows and imports only when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of `package`.

    Args:
        package: its `__name__`.
        homes: the names by the module, below `package`, that defines them.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    shown = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home_of[name]}"), name)
        shown[name] = value
        return value

    return get, lambda: sorted({*shown, *home_of}), sorted(home_of)
