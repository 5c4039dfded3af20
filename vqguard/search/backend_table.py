"""The back ends of the search: the one table that configuration, choice and tuning read.

A class is imported when it is first asked for, so that a configuration is read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vqguard.errors import ConfigError
from vqguard.names import nearest

if TYPE_CHECKING:
    from vqguard.search.base import CodewordSearch

AUTO = "auto"
"""The choice among all back ends; see `choose.make_search`."""

_BACKENDS: dict[str, str | type[CodewordSearch]] = {
    "torch": "vqguard.search.dense:DenseSearch",
    "pruned": "vqguard.search.pruned:PrunedSearch",
    "faiss": "vqguard.search.faiss_index:FaissSearch",
    "tensor-cores": "vqguard.search.tensor_cores:TensorCoreSearch",
    "faiss-gpu": "vqguard.search.faiss_index:FaissGpuSearch",
}


def backend_choices() -> tuple[str, ...]:
    """What `GuardConfig.search` and `make_search` accept."""
    return (AUTO, *_BACKENDS)


def add_backend(backend: type[CodewordSearch]) -> None:
    """Add a back end under its `name`, for `make_search`, `GuardConfig` and tuning.

    Raises:
        ConfigError: where the name is empty or taken.
    """
    name = backend.name
    if not name or name in backend_choices():
        raise ConfigError(
            f"{backend.__name__}: the search has a back end called {name!r} already, or the name"
            " is empty; give the class another `name`"
        )
    _BACKENDS[name] = backend


def backend_problem(name: str) -> str | None:
    """Why `name` is no choice, with the nearest one, or None."""
    choices = backend_choices()
    if name in choices:
        return None
    return f"unknown back end {name!r}.{nearest(name, choices)}"


def backend_class(name: str) -> type[CodewordSearch]:
    """The class of a back end in the table.

    Raises:
        KeyError: for another name.
    """
    entry = _BACKENDS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    return entry


def backends_on(device: str) -> list[type[CodewordSearch]]:
    """The back ends that take tensors of this device type ("cpu", "cuda"), in the table's order."""
    classes = [backend_class(name) for name in _BACKENDS]
    return [backend for backend in classes if device in (backend.devices or (device,))]
