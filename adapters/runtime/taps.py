"""Taps: what a module is given or gives, seen and changed while one call runs.

A tapped module has a subclass that asks a context variable whether the running call wants it;
outside of such a call it does what it always did. Calls in other threads see nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import nn

from vqguard.adapters.runtime.class_swap import become, guarded_class
from vqguard.adapters.seams import original_method

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(original forward, args, kwargs) -> output."""

_HANDLERS: ContextVar[Mapping[int, Handler]] = ContextVar(
    "vqguard_taps", default=MappingProxyType({})
)
_LOCK = threading.Lock()
_BORROWED: dict[nn.Module, int] = {}
"""Modules that are tapped for a while, with the number of calls that need them so."""


class Tapped:
    """Mixed into the class of a module whose input or output is of interest."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, through the running call's handler where it has one."""
        module: Any = self
        original = original_method(module, "forward")
        handlers = _HANDLERS.get()
        handler = handlers.get(id(module))
        if handler is None:
            return original(*args, **kwargs)
        # While the handler runs, the module itself is an ordinary one.
        token = _HANDLERS.set({key: other for key, other in handlers.items() if key != id(module)})
        try:
            return handler(original, args, kwargs)
        finally:
            _HANDLERS.reset(token)


def tap_class(cls: type) -> type:
    """The tapped subclass of a module's class; the class itself when it is one."""
    return cls if issubclass(cls, Tapped) else guarded_class(cls, (Tapped,))


@contextmanager
def tapping(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Inside, in this thread, calls of these modules go to their handlers.

    Modules that are not tapped for good (a model without guard) are so until the end.
    """
    borrowed = _borrow(handlers)
    known = {id(module): handler for module, handler in handlers.items()}
    token = _HANDLERS.set({**_HANDLERS.get(), **known})
    try:
        yield
    finally:
        _HANDLERS.reset(token)
        _give_back(borrowed)


def _borrow(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Tap those that are not tapped for good. Threads may borrow the same ones."""
    with _LOCK:
        borrowed = [m for m in modules if m in _BORROWED or not isinstance(m, Tapped)]
        for module in borrowed:
            if module not in _BORROWED:
                become(module, tap_class(type(module)))
            _BORROWED[module] = _BORROWED.get(module, 0) + 1
    return borrowed


def _give_back(borrowed: list[nn.Module]) -> None:
    with _LOCK:
        for module in borrowed:
            _BORROWED[module] -= 1
            if not _BORROWED[module]:
                del _BORROWED[module]
                become(module, type(module).vqguard_original)  # type: ignore[attr-defined]
