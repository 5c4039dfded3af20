"""Class substitution: a module becomes an instance of a subclass of its own class.

Unlike a method patched on the instance it survives `copy.deepcopy`, is seen by `isinstance`, and
leaves no trace when the class is put back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vqguard.adapters.runtime.capturing_hooks import make_picklable

_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}


def become(module: nn.Module, cls: type) -> None:
    """Change the class; hooks of accelerate (device maps, off-loading) keep a bound forward."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = getattr(cls, "forward").__get__(module)  # noqa: B009


def is_patched(module: nn.Module, name: str) -> bool:
    """Whether a method was set on the instance, which hides the class's.

    Accelerate's own hook, which calls it, is no such patch.
    """
    of_accelerate = name == "forward" and "_old_forward" in module.__dict__
    return name in module.__dict__ and not of_accelerate


def guarded_class(original: type, mixins: tuple[type, ...]) -> type:
    """A subclass of `original` that goes by its name, with the mixins in front.

    Overridden methods keep the signature of the original: Trainer, PEFT and `generate` read it.
    """
    if (original, mixins) in _CLASSES:
        return _CLASSES[original, mixins]
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "vqguard_original": original,
    }
    for mixin in mixins:
        for base in mixin.__mro__[:-1]:
            for name, function in vars(base).items():
                if callable(function) and not name.startswith("__") and hasattr(original, name):
                    namespace.setdefault(name, _like(getattr(original, name), function))
    cls = type(original.__name__, (*mixins, original), namespace)
    return _CLASSES.setdefault((original, mixins), cls)


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    # The bookkeeping around the original is not traced; the original itself is.
    disable: Any = torch.compiler.disable
    return functools.wraps(original)(disable(method, recursive=False))


def _reduce(self: Any, protocol: Any) -> Any:
    # The class cannot be found by its name (its original is there): rebuild it from its parts.
    make_picklable(self.__dict__.get("_vqguard_top", self))
    cls = type(self)
    mixins = tuple(base for base in cls.__bases__ if base is not cls.vqguard_original)
    return _rebuild, (cls.vqguard_original, mixins), self.__dict__


def _rebuild(original: type, mixins: tuple[type, ...]) -> Any:
    cls: Any = guarded_class(original, mixins)
    return cls.__new__(cls)
