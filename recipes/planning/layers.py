"""A step of a deep model from a step of a few of its layers.

Layers that are alike take and free the same blocks one after the other. So a step is run with the
first few, and what one of them added is put in again for each that was left out. That they are
alike is not assumed: neighbours must have added the same bytes in the same order, or the whole
model is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

from vqguard.recipes.planning.heap import Event

KEPT = 5
"""Layers that are run: the first and the last may differ, and two of the others are compared."""


def alike_layers(model: Any, language: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The language model's list of layers: its holder, its name there, and itself.

    None where there are few or they are not all of one kind.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [""]
    lists = [
        (holder, name, child)
        for holder in language.modules()
        for name, child in holder.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    if not lists or len(set(kinds)) > 1:
        return None
    longest = max(lists, key=lambda candidate: len(candidate[2]))
    forms = {_form(layer) for layer in longest[2]}
    return longest if len(longest[2]) > KEPT and len(forms) == 1 else None


def _form(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    held = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    return modules, held


@contextmanager
def few_layers(
    stack: tuple[nn.Module, str, nn.ModuleList], here: Callable[[], int]
) -> Iterator[list[int]]:
    """Inside, the model has its first `KEPT` layers.

    Gives where `here` was when each began its forward pass, and then, last layer first, when the
    gradient came to each.
    """
    holder, name, layers = stack
    marks: list[int] = []
    begun: set[int] = set()

    def begins(layer: nn.Module, arguments: Any) -> None:
        if id(layer) not in begun:  # checkpointing runs it again
            begun.add(id(layer))
            marks.append(here())

    def ends(layer: nn.Module, arguments: Any, output: Any) -> None:
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        if states.requires_grad:
            states.register_hook(lambda gradient: marks.append(here()))

    setattr(holder, name, nn.ModuleList(layers[:KEPT]))
    hooks = [layer.register_forward_pre_hook(begins) for layer in layers[:KEPT]]
    hooks += [layer.register_forward_hook(ends) for layer in layers[:KEPT]]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
        setattr(holder, name, layers)


def deep_peak(events: list[Event], marks: list[int], layers: int) -> int | None:
    """Peak bytes of a step of `layers` layers, from the blocks of a step of `KEPT`.

    None where the layers that were run do not repeat each other.
    """
    if len(marks) != 2 * KEPT:
        return None
    sizes: dict[int, int] = {}
    changes = []
    for block, size in events:
        changes.append(size or -sizes[block])
        sizes[block] = size
    parts = [changes[a:b] for a, b in pairwise([0, *marks, len(changes)])]
    # parts[0] comes before the first layer; parts[KEPT] is the last layer and the loss; the last is
    # the backward pass of the first layer and what follows it.
    forward, backward = parts[1:KEPT], parts[KEPT + 1 : -1]
    deep = []
    for some in (forward, backward):
        again = next(
            (i for i, (first, second) in enumerate(pairwise(some)) if first == second), None
        )
        if again is None:
            return None
        deep.append(some[:again] + [some[again]] * (layers - KEPT) + some[again:])
    whole = [parts[0], *deep[0], parts[KEPT], *deep[1], parts[-1]]
    return max(accumulate(change for part in whole for change in part), default=0)
