"""Families that take pictures by row of the batch, and hand on their features row by row.

Read from transformers' `models/idefics2`, `idefics3`, `smolvlm` and `granite_docling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.seams import Seam, equal_parts, split_units
from vqguard.errors import InputError, SeamError

FAINTEST = 1e-4
"""The least that the strongest value of a picture may be. The families leave out pictures that are
zero in the model's dtype: what is weaker could be one in float16 and not in float32, and no one
could say which pictures the features are of. Any picture of a processor is far stronger."""


class ByRowAdapter(DefaultAdapter):
    """A unit is a picture, though the family's own output has a tensor for each row."""

    def shown(self, arguments: Mapping[str, Any]) -> list[int] | None:
        """How many pictures of each row the encoder is shown; None without pixels.

        Raises:
            InputError: for a picture that is nearly zero, or no picture at all.
        """
        pixels = arguments.get("pixel_values")
        if pixels is None:
            return None
        strongest = pixels.abs().flatten(2).amax(-1)
        if bool(((strongest > 0) & (strongest < FAINTEST)).any()):
            raise InputError(
                f"expected pictures, and zeros where a row has fewer than another, got one whose "
                f"strongest value is under {FAINTEST}: it can be told from neither"
            )
        counts = [int(count) for count in (strongest > 0).sum(-1)]
        if not any(counts):
            raise InputError("expected a picture in pixel_values, got nothing but zeros")
        return counts

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        self.shown(arguments)  # says what is wrong with them before the encoder does
        return super().run(model, seam, arguments)

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        rows, counts = split_units(features), self.shown(arguments)
        if counts is None:
            return rows
        if len(counts) != len(rows):
            raise SeamError(
                f"expected features of {len(counts)} rows, as the pixels have, got {len(rows)}"
            )
        units = [
            unit
            for row, count in zip(rows, counts, strict=True)
            if count or len(row)
            for unit in equal_parts(row, count)
        ]
        if len({len(unit) for unit in units}) > 1:
            raise SeamError(
                f"expected as many visual tokens for each picture, got {[len(u) for u in units]} "
                f"(pictures by row: {counts}): they cannot be judged one by one"
            )
        return units

    def join(self, seam: Seam, like: Any, units: list[Tensor]) -> Any:
        rows = torch.split(torch.cat(units), [row.numel() // row.shape[-1] for row in like])
        shaped = [row.reshape(form.shape) for row, form in zip(rows, like, strict=True)]
        return tuple(shaped) if isinstance(like, tuple) else shaped

    def repeat(self, seam: Seam, value: Any, arguments: Mapping[str, Any], times: int) -> Any:
        rows = [row for row in value for _ in range(times)]
        return tuple(rows) if isinstance(value, tuple) else rows
