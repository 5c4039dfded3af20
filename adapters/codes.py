"""What pictures are to a language model behind a frozen guard: whole numbers.

Training reads them in place of pixels. Inference does not: see `GuardLink.quantise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vqguard.errors import SeamError
from vqguard.strict import StrictData

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form(StrictData):
    """In what a family holds the features of a batch, without them."""

    kind: Literal["tensor", "list", "tuple"]
    shapes: tuple[Shape, ...]
    """Of the tensor, or of each tensor in the list."""

    @classmethod
    def of(cls, value: Any) -> Form:
        """The form of what a seam's output holds.

        Raises:
            SeamError: it is neither a tensor nor a list or tuple of tensors.
        """
        if isinstance(value, Tensor):
            return cls("tensor", (tuple(value.shape),))
        if isinstance(value, (list, tuple)) and all(isinstance(part, Tensor) for part in value):
            kind: Literal["list", "tuple"] = "tuple" if isinstance(value, tuple) else "list"
            return cls(kind, tuple(tuple(part.shape) for part in value))
        raise SeamError(
            f"features are held in a {type(value).__name__}, not in tensors: pictures of several "
            "samples cannot be put together from codes"
        )

    def like(self) -> Any:
        """Tensors of this form without data, for `Adapter.join`."""
        empty = [torch.empty(shape, device="meta") for shape in self.shapes]
        if self.kind == "tensor":
            return empty[0]
        return tuple(empty) if self.kind == "tuple" else empty

    @classmethod
    def joined(cls, forms: Sequence[Form]) -> Form:
        """One batch of several, as the family would hold it.

        Raises:
            SeamError: tensors that differ behind their first dimension.
        """
        kind = forms[0].kind
        shapes = [shape for form in forms for shape in form.shapes]
        if kind != "tensor":
            return cls(kind, tuple(shapes))
        return cls(kind, (stacked_shape(shapes),))

    def parts(self, counts: Sequence[Sequence[int]]) -> list[Form]:
        """The form of each sample, whose units have these many tokens; the inverse of `joined`.

        Raises:
            SeamError: the batch cannot be told apart by sample.
        """
        if self.kind == "tensor":
            (_, *rest) = shape = self.shapes[0]
            row, tokens = math.prod(rest[:-1]), sum(map(sum, counts))
            if row and tokens == shape[0] * row and not any(sum(part) % row for part in counts):
                return [Form("tensor", ((sum(part) // row, *rest),)) for part in counts]
        elif len(self.shapes) == sum(map(len, counts)):
            left = iter(self.shapes)
            return [Form(self.kind, tuple(next(left) for _ in part)) for part in counts]
        elif len(self.shapes) == len(counts):
            return [Form(self.kind, (shape,)) for shape in self.shapes]
        raise SeamError(
            f"features are held in a {self.kind} of {self.shapes}, and samples have "
            f"{[list(part) for part in counts]} tokens: they cannot be told apart"
        )


def stacked_shape(shapes: Sequence[Shape]) -> Shape:
    """The shape of these tensors one after another.

    Raises:
        SeamError: they differ behind their first dimension.
    """
    if len({shape[1:] for shape in shapes}) != 1:
        raise SeamError(
            f"pictures of several shapes ({sorted(set(shapes))[:4]}) are filled up in one batch"
        )
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class VisualCodes:
    """The pictures of a sample or of a batch, as codes at the guard's site.

    `tokens`: (N_i,) a unit, of any integer dtype. Behind the codebook's P codes come the family's
    constants (`Adapter.static_vectors`): P + k is the k-th of them. `semantic`: (S_i,) a unit.
    `deep`: for each deep-stack level what `tokens` is.
    """

    tokens: list[Tensor]
    semantic: list[Tensor]
    deep: tuple[list[Tensor], ...]
    form: Form
    """Of what the seam gives."""
    deep_form: Form | None
    """Of what it gives for each deep-stack level."""
    positions: list[int]
    """How many the seam gives for each unit."""
    pixels: dict[str, Shape]
    """Names and shapes of the pixels that the codes stand for."""
    dtype: torch.dtype
    """Of the features that they were made of."""

    @classmethod
    def joined(cls, parts: Sequence[VisualCodes]) -> VisualCodes:
        """One batch of several samples.

        Raises:
            SeamError: samples that the family would not hold in one batch as they are.
        """
        first = parts[0]
        if len({(part.form.kind, part.dtype, tuple(part.pixels)) for part in parts}) != 1:
            raise SeamError("codes of several samples were made in different ways")
        deep_forms = [part.deep_form for part in parts if part.deep_form is not None]
        levels = zip(*(part.deep for part in parts), strict=True)
        return cls(
            [unit for part in parts for unit in part.tokens],
            [unit for part in parts for unit in part.semantic],
            tuple([unit for level in same for unit in level] for same in levels),
            Form.joined([part.form for part in parts]),
            Form.joined(deep_forms) if deep_forms else None,
            [count for part in parts for count in part.positions],
            {name: _fullest([part.pixels[name] for part in parts]) for name in first.pixels},
            first.dtype,
        )

    def by_sample(
        self, samples: Sequence[Sequence[int]], pixels: Sequence[dict[str, Shape]]
    ) -> list[VisualCodes]:
        """Those of each sample alone.

        Args:
            samples: the units that each of them shows, which follow one another.
            pixels: as in the field, of each.

        Raises:
            SeamError: the batch cannot be told apart by sample.
        """
        order = [unit for units in samples for unit in units]
        if order != list(range(len(self.tokens))):
            raise SeamError("pictures do not lie in the order of their samples")
        counts = [[self.positions[unit] for unit in units] for units in samples]
        forms = self.form.parts(counts)
        deep = [None] * len(samples) if self.deep_form is None else self.deep_form.parts(counts)
        return [
            VisualCodes(
                [self.tokens[unit] for unit in units],
                [self.semantic[unit] for unit in units],
                tuple([level[unit] for unit in units] for level in self.deep),
                form,
                deep_form,
                list(own),
                shapes,
                self.dtype,
            )
            for units, form, deep_form, own, shapes in zip(
                samples, forms, deep, counts, pixels, strict=True
            )
        ]


def _fullest(shapes: Sequence[Shape]) -> Shape:
    """The shape of pixels one after another, filled up where they differ."""
    sizes = [max(dims) for dims in zip(*(shape[1:] for shape in shapes), strict=True)]
    return (sum(shape[0] for shape in shapes), *sizes)
