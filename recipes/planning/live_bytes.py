"""Bytes that a computation on the meta device holds, as its tensors come and go.

Layers of one kind do the same operations on the same shapes, and torch's rules for shapes are
Python that takes several times as long as making the result. Each is therefore asked once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqguard.recipes.planning.heap import Event


class LiveBytes(TorchDispatchMode):
    """Bytes of the meta storages made inside and still alive, their peak, and their history."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.events: list[Event] = []
        self._known: dict[int, int] = {}  # storage -> its number in the history
        self._made = 0
        self._results: dict[Any, Any] = {}  # form of a call -> form of its result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = (func, _form(args), _form(kwargs))
        if call in self._results:
            result = _make(self._results[call])
            made = list(_meta_tensors(result))
        else:
            result = func(*args, **(kwargs or {}))
            given = {id(t.untyped_storage()) for t in _meta_tensors((args, kwargs))}
            tensors = list(_meta_tensors(result))
            made = [t for t in tensors if id(t.untyped_storage()) not in given]
            if len(made) == len(tensors) and not func._schema.is_mutable and _whole(made):
                self._results[call] = _form(result)
        for tensor in made:
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()
        self._made += 1
        self._known[key] = self._made
        self.events.append((self._made, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.events.append((self._known.pop(key), 0))
        self.now -= size


class _Shape(tuple[Any, ...]):
    """Size, strides and dtype of a tensor on the meta device."""


def _form(value: Any) -> Any:
    """What of an argument or a result decides shapes; equal only if it is of the same type."""
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            return object()  # its numbers may decide: equal to no other
        return _Shape((value.shape, value.stride(), value.dtype))
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(item)) for name, item in value.items())
    return type(value), value


def _make(form: Any) -> Any:
    """A result of this form."""
    if isinstance(form, _Shape):
        size, stride, dtype = form
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")
    if form and isinstance(form[0], type):
        return form[1]
    return tuple(map(_make, form))


def _whole(tensors: list[Tensor]) -> bool:
    """Whether each has a storage of its own and of its size, as one made from its form has."""
    own = {id(t.untyped_storage()) for t in tensors}
    return len(own) == len(tensors) and all(
        t.untyped_storage().nbytes() == _make(_form(t)).untyped_storage().nbytes() for t in tensors
    )


def _meta_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.device.type == "meta":
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _meta_tensors(item)
    elif isinstance(value, dict):
        yield from _meta_tensors(tuple(value.values()))
