"""The table of adapters by `config.model_type`, and the decorator that fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from vqguard.errors import SeamError

if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")

_ADAPTERS: dict[str, type[Adapter]] = {}


def register_adapter(*model_types: str) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: this adapter serves models whose `config.model_type` is one of these.

    Raises `SeamError` when a type already has another adapter: two answers to the question where
    a model must be guarded cannot both be right.
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        for model_type in model_types:
            known = _ADAPTERS.get(model_type)
            if known is not None and known.__qualname__ != adapter.__qualname__:
                raise SeamError(
                    f"model type {model_type!r} already has the adapter {known.__qualname__}; "
                    f"give {adapter.__qualname__} a type of its own"
                )
            _ADAPTERS[model_type] = adapter
        return adapter

    return register


def adapter_table() -> Mapping[str, type[Adapter]]:
    """The adapters that have registered so far, read-only: `registry.py` imports the others."""
    return MappingProxyType(_ADAPTERS)
