"""Prompts that hold a family's pictures, in the forms of several families' processors.

A form of one family's own is in its file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.seams import Seam
from vqguard.adapters.text import TextSide

BOS, PAD, EOS = 0, 1, 2


@dataclass(frozen=True)
class Layout:
    """What a prompt has to hold."""

    model: Any
    adapter: TextSide
    seam: Seam
    images: Sequence[int]
    """Pictures (or videos) in each row."""
    counts: Sequence[int]
    """Positions of each unit, as the unguarded model makes them."""
    right: bool = False
    """Whether rows are padded on the right."""
    stamped_frames: bool = False
    """Whether a video's frames are written one by one."""

    @property
    def placeholder(self) -> int:
        """The token that the seam's features take the place of."""
        names = self.adapter.placeholders[self.seam.modality]
        tokens = [getattr(self.model.config, name, None) for name in names]
        return int(next(token for token in tokens if token is not None))


def pad_rows(rows: list[list[int]], right: bool = False, fill: int = PAD) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask."""
    width = max(len(row) for row in rows)
    gaps = [[fill] * (width - len(row)) for row in rows]
    ids = [row + gap if right else gap + row for row, gap in zip(rows, gaps, strict=True)]
    masks = [
        [1] * len(row) + [0] * len(gap) if right else [0] * len(gap) + [1] * len(row)
        for row, gap in zip(rows, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(masks)


def placeholders(layout: Layout) -> dict[str, Any]:
    """Placeholders for every picture, a token between them, and a few words."""
    images, counts, right = layout.images, layout.counts, layout.right
    token = layout.placeholder
    mark = 1 if layout.seam.modality == "image" else 2
    stamped = layout.seam.modality == "video" and layout.stamped_frames
    units = len(counts) // sum(images) if sum(images) and len(counts) > len(images) else 1
    by_row = len(counts) == len(images) != sum(images)
    left = list(counts)
    rows, kinds = [], []
    for index, number in enumerate(images):
        row, kind = [BOS], [0]
        for _ in range(1 if by_row and number else number):
            for _ in range(units):
                count = left.pop(0)
                for part in [count // 2, count // 2] if stamped else [count]:
                    slots, marks = [token] * part, [mark] * part
                    row += [107, *slots, 108] if stamped else slots
                    kind += [0, *marks, 0] if stamped else marks
            row.append(3)
            kind.append(0)
        words = list(range(5, 9 + index))
        rows.append(row + words)
        kinds.append(kind + [0] * len(words))
    ids, mask = pad_rows(rows, right)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(type(layout.model).forward).parameters
    types, _ = pad_rows(kinds, right, fill=0)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = types
    if "token_type_ids" in names:
        inputs["token_type_ids"] = types.clamp(max=1)
    return inputs


def words(layout: Layout) -> dict[str, Any]:
    """A prompt without placeholders."""
    rows = [[BOS, *range(5, 9 + row)] for row in range(len(layout.images))]
    ids, mask = pad_rows(rows, layout.right)
    return {"input_ids": ids, "attention_mask": mask}
