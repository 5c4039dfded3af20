"""A seam: one place where visual features enter a language model.

How seams are found, how their output is read, and how the methods that they name are called as
their classes defined them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqguard.errors import SeamError

Joins = Literal["replace", "add", "prepend", "cross-attend", "encode"]
"""How features join the text: in place of placeholders, added to them, in front of the text, read
by cross-attention, or as the input of an encoder-decoder's encoder."""

Modality = Literal["image", "video"]
METHODS: dict[str, Modality] = {"get_image_features": "image", "get_video_features": "video"}
PIXEL_NAMES = ("pixel_values", "flattened_patches", "image_patches")
"""What arguments that hold pixels are called, or have in their names."""


@dataclass(frozen=True)
class Seam:
    """One method of one module whose output carries visual features to the language model.

    `path`: the module, from the top of the model. `field`: where the output holds the features: an
    attribute, an index of a tuple, or "" for the output itself. `deep`: the attribute that holds
    deep-stack features, one entry a level. `pixels`: arguments of the model that start the encoder.

    The features are a tensor (units, N, d) or (N, d), or a list or tuple of tensors (..., d). A
    *unit* is what has one verdict: an image or a video, or a tile where the family keeps tiles
    apart.
    """

    path: str = "model"
    method: str = "get_image_features"
    modality: Modality = "image"
    pixels: tuple[str, ...] = ("pixel_values",)
    field: str | int = "pooler_output"
    deep: str = ""
    joins: Joins = "replace"

    @property
    def inner(self) -> bool:
        """Whether the seam lies inside the model's `forward`, where no pixels can be seen."""
        return self.method not in METHODS

    def shown(self, arguments: Mapping[str, Any]) -> Any:
        """The pixels among `arguments`, by whichever of their names; None where there are none."""
        given = (arguments.get(name) for name in self.pixels)
        return next((pixels for pixels in given if pixels is not None), None)

    def read(self, output: Any) -> Any:
        """The features in an output; None where there are none."""
        if self.field == "":
            return output
        if isinstance(self.field, int):
            return output[self.field]
        return getattr(output, self.field)

    def write(self, output: Any, features: Any) -> Any:
        """A copy of `output` with other features in it."""
        if self.field == "":
            return features
        if isinstance(self.field, int):
            parts = list(output)
            parts[self.field] = features
            return tuple(parts)
        output = copy(output)
        setattr(output, self.field, features)
        return output

    def levels(self, output: Any) -> list[Any]:
        """Deep-stack features, one entry a level; none without deep-stack."""
        levels = getattr(output, self.deep, None) if self.deep else None
        return [] if levels is None else list(levels)


def split_units(features: Any) -> list[Tensor]:
    """(units, N, d), (N, d) or a sequence of (..., d) as a list of (N_i, d).

    Raises:
        SeamError: for anything else: what cannot be read cannot be quantised.
    """
    if isinstance(features, Tensor) and features.dim() in (2, 3):
        return list(features) if features.dim() == 3 else [features]
    if isinstance(features, (list, tuple)) and all(
        isinstance(unit, Tensor) and unit.dim() >= 2 for unit in features
    ):
        return [unit.flatten(0, -2) for unit in features]
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise SeamError(
        f"expected visual features as a tensor of 2 or 3 dimensions or a list of tensors, got "
        f"{shape}: declare a split for this family"
    )


def join_units(like: Any, units: list[Tensor]) -> Any:
    """`units` in the form of `like`; more of them than it had where beams repeat images."""
    if isinstance(like, Tensor):
        return torch.cat(units).reshape(-1, *like.shape[1:])
    if len(like) == len(units):
        units = [unit.reshape(form.shape) for form, unit in zip(like, units, strict=True)]
    return tuple(units) if isinstance(like, tuple) else units


def stack_if_even(tokens: list[Tensor]) -> Tensor | list[Tensor]:
    """(B, N, d) when all units have as many tokens, otherwise the list as it is."""
    return torch.stack(tokens) if len({len(unit) for unit in tokens}) == 1 else tokens


def means(tokens: Tensor | list[Tensor]) -> Tensor:
    """(B, 1, d): the mean token of each unit."""
    return torch.stack([unit.mean(0, keepdim=True) for unit in tokens])


def equal_parts(unit: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` tensors (N / count, d) from (N, d).

    Raises:
        SeamError: when they would not be equal: tokens of one picture would be judged with
            another's.
    """
    if count < 1 or len(unit) % count:
        raise SeamError(
            f"expected visual tokens in a multiple of {count} frames or tiles, got {len(unit)}: "
            "they cannot be judged one by one"
        )
    return unit.chunk(count)


def submodule(root: nn.Module, path: str, what: str) -> nn.Module:
    """`root.<path>`; `SeamError` naming the path when the model does not have it."""
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise SeamError(
            f"expected the {what} at {path!r} in {type(root).__name__}, found nothing there: "
            "this model differs from its family; it was not guarded"
        ) from error


def way_to(model: nn.Module, seam: Seam) -> list[nn.Module]:
    """The modules from `model` to the one that the seam is in, both included."""
    parts = seam.path.split(".") if seam.path else []
    return [submodule(model, ".".join(parts[:depth]), "seam") for depth in range(len(parts) + 1)]


class _Tree:
    """The modules of a model when seams were found in it, their classes, and the methods of these.

    It keeps no module alive: while all of them live, their addresses tell them apart.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [
            (weakref.ref(module), type(module), tuple(held), tuple(map(id, held.values())))
            for module in modules
            for held in [module._modules]
        ]
        self._methods = {cls: _methods_of(cls) for cls in {type(module) for module in modules}}

    def stands(self) -> bool:
        """Whether looking again would find the same; never where a module's methods are its own."""
        for reference, cls, names, children in self._modules:
            module = reference()
            if module is None or type(module) is not cls:
                return False
            held, own = module._modules, module.__dict__
            if len(held) != len(names):
                return False
            if names and (tuple(held) != names or tuple(map(id, held.values())) != children):
                return False
            for name in METHODS:
                if name in own:
                    return False
        return all(_methods_of(cls) == methods for cls, methods in self._methods.items())


def _methods_of(cls: type) -> tuple[Any, ...]:
    return tuple(getattr(cls, name, None) for name in METHODS)


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[_Tree, tuple[Seam, ...]]]
_FOUND = weakref.WeakKeyDictionary()
"""The seams of models, and the trees in which they were found: looking for them takes longer than
a picture's way through a small tower, and is done several times on that way."""


def find_seams(model: nn.Module) -> tuple[Seam, ...]:
    """The seams of a model that follows the common convention, found by looking.

    The innermost module with a method of its own feeds its own `forward`; the outer model's method
    of the same name only calls it. They are looked for again after any module of the model was
    added, replaced, taken out or given another class.

    Raises:
        SeamError: when there is none.
    """
    known = _FOUND.get(model)
    if known is not None and known[0].stands():
        return known[1]
    tree = _Tree(model)
    seams = _look_for_seams(model)
    _FOUND[model] = tree, seams
    return seams


def _look_for_seams(model: nn.Module) -> tuple[Seam, ...]:
    seams: list[Seam] = []
    owners = {
        method: [
            path
            for path, module in model.named_modules(remove_duplicate=False)
            if callable(getattr(type(module), method, None))
        ]
        for method in METHODS
    }
    for method, modality in METHODS.items():
        for path in owners[method]:
            head = path + "." if path else ""
            if not any(other != path and other.startswith(head) for other in owners[method]):
                owner = submodule(model, path, "seam")
                seams.append(Seam(path, method, modality, pixel_names(getattr(owner, method))))
    if not any(seam.modality == "image" for seam in seams):
        raise SeamError(
            f"{type(model).__name__} has no get_image_features: where its images enter the "
            "language model is not known; declare its seams with register_adapter"
        )
    return tuple(seams)


def pixel_names(method: Any) -> tuple[str, ...]:
    """Those arguments of a method that hold pixels, all of a family's resolutions among them."""
    return tuple(name for name in inspect.signature(method).parameters if names_pixels(name))


def names_pixels(name: str) -> bool:
    """Whether an argument of this name is taken for pixels where seams are found by looking."""
    return any(known in name for known in PIXEL_NAMES)


def parameter_names(module: nn.Module) -> set[str]:
    """Last parts of the names of a module's parameters."""
    held = (part._parameters.items() for part in module.modules())
    return {name for items in held for name, value in items if value is not None}


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
