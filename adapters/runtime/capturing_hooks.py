"""Hooks by which transformers collects hidden states, in a form that pickle takes.

transformers hangs them on a model at the first call that asks for hidden states, and leaves them
there. They are local functions, which pickle refuses: a LLaVA that ran once could not be pickled.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

Installer = Callable[..., None]
"""(module, **what it collects): the function of transformers that hangs a hook on a module."""


class CapturingHook:
    """One of these hooks: called as it was, pickled as what made it."""

    def __init__(self, hook: Callable[..., Any], installer: Installer, made_with: Any) -> None:
        """`made_with`: the arguments by name, beside the module, that `installer` was given."""
        self.hook = hook
        self.installer = installer
        self.made_with = made_with

    def __call__(self, *args: Any) -> Any:
        return self.hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturingHook:
        return self  # as of a function: it holds nothing of its module

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _made_again, (self.installer, self.made_with)


def make_picklable(model: nn.Module) -> None:
    """Put a `CapturingHook` in the place of each such function of `model`.

    Each keeps its place in the order; calls in other threads go on.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            made = _taken_apart(hook)
            if made is not None:
                module._forward_hooks[key] = made


def _taken_apart(hook: Any) -> CapturingHook | None:
    """The hook with what made it; None for hooks of others."""
    owner = getattr(hook, "__module__", None) or ""
    if not inspect.isfunction(hook) or not owner.startswith("transformers."):
        return None
    installer = getattr(sys.modules[owner], hook.__qualname__.partition(".")[0], None)
    if not callable(installer):
        return None
    known = dict(inspect.getclosurevars(hook).nonlocals)
    for helper in list(known.values()):
        if inspect.isfunction(helper):
            known |= inspect.getclosurevars(helper).nonlocals
    _, *names = inspect.signature(installer).parameters
    return CapturingHook(hook, installer, {name: known[name] for name in names if name in known})


def _made_again(installer: Installer, made_with: Any) -> CapturingHook:
    bare = nn.Module()
    installer(bare, **made_with)
    (hook,) = bare._forward_hooks.values()
    return CapturingHook(hook, installer, made_with)
