"""The methods of guarded modules as their classes defined them, and their arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn


def original_method(module: nn.Module, name: str) -> Any:
    """A bound method of `module` as its class defined it before any guard was installed."""
    cls = getattr(type(module), "vqguard_original", type(module))
    return MethodType(getattr(cls, name), module)


def bind(method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as the bound `method` would receive them."""
    names = [
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} positional arguments, got {len(args)}")
    named = dict(zip(names, args, strict=False))
    twice = sorted(named.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"got more than one value for {', '.join(twice)}")
    return named | dict(kwargs)
