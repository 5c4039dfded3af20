"""Names that a package shows and imports only when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
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


def import_after(module: str, follower: str) -> None:
    """Import `follower` as soon as `module` is imported: now, if it is already."""
    if module in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _Watch(module, follower))


class _Watch(MetaPathFinder):
    """Finds one module, as the other finders would, and has another imported after it."""

    def __init__(self, module: str, follower: str) -> None:
        self.module = module
        self.follower = follower

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderOfBoth(spec.loader, self.follower)
        return spec


class _LoaderOfBoth(Loader):
    def __init__(self, loader: Loader, follower: str) -> None:
        self._loader = loader
        self._follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What reads a module's loader, as importlib.resources does, gets the real one.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module(self._follower)
