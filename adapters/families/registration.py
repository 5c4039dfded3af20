"""The tables of adapters and of families by `config.model_type`, and what fills them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from vqguard.adapters.families.family import Family
from vqguard.errors import SeamError

if TYPE_CHECKING:
    from vqguard.adapters.base import Adapter

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")

_ADAPTERS: dict[str, type[Adapter]] = {}
_FAMILIES: dict[str, Family] = {}


def register_adapter(*families: str | Family) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: this adapter serves models whose `config.model_type` is one of these.

    A type is named by itself, or by a `Family` with what else there is to say about it.

    Raises:
        SeamError: when a type already has another adapter, since two answers to the question where
            a model must be guarded cannot both be right, and for types that are never guarded.
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        for said in families:
            model_type = said if isinstance(said, str) else said.model_type
            known = _ADAPTERS.get(model_type)
            if known is not None and known.__qualname__ != adapter.__qualname__:
                raise SeamError(
                    f"model type {model_type!r} already has the adapter {known.__qualname__}; "
                    f"give {adapter.__qualname__} a type of its own"
                )
            before = _FAMILIES.get(model_type, Family(model_type))
            family = Family(model_type) if isinstance(said, str) else said
            refused = family.refused or before.refused
            if refused:
                raise SeamError(f"models of type {model_type!r} are not guarded: {refused}")
            # a class that registers again by the bare type keeps what was said before
            keeps = isinstance(said, str) and known is not None
            _ADAPTERS[model_type] = adapter
            _FAMILIES[model_type] = before if keeps else family
        return adapter

    return register


def leave_unguarded(*families: Family) -> None:
    """Name types that get no adapter: they are `refused`, or `blind`.

    Raises:
        SeamError: when one has an adapter, or no reason.
    """
    for family in families:
        known = _ADAPTERS.get(family.model_type)
        if known is not None or not (family.refused or family.blind):
            raise SeamError(
                f"model type {family.model_type!r} cannot be left unguarded: expected one without "
                f"an adapter, and why, got the adapter {known.__qualname__ if known else 'none'} "
                f"and {family.refused or family.blind or 'no reason'!r}"
            )
        _FAMILIES[family.model_type] = family


def adapter_table() -> Mapping[str, type[Adapter]]:
    """The adapters that have registered so far, read-only: `registry.py` imports the others."""
    return MappingProxyType(_ADAPTERS)


def family_table() -> Mapping[str, Family]:
    """The families that were declared so far, read-only."""
    return MappingProxyType(_FAMILIES)
