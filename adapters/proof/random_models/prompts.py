"""Prompts that hold a family's pictures, in the form that its processor gives them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.proof.random_models.sizes import BOS, PAD
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.seams import Seam


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


def placeholders(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Placeholders for every picture, a token between them, and a few words."""
    token = placeholder(model, seam)
    units = len(counts) // sum(images) if sum(images) and len(counts) > len(images) else 1
    by_row = len(counts) == len(images) != sum(images)
    left = list(counts)
    rows, kinds = [], []
    for index, number in enumerate(images):
        row, kind = [BOS], [0]
        for _ in range(1 if by_row and number else number):
            for _ in range(units):
                count = left.pop(0)
                parts = [count]
                if seam.modality == "video" and model.config.model_type in SPLIT_FRAMES:
                    parts = [count // 2, count // 2]
                wrapped = len(parts) > 1
                for part in parts:
                    slots = [token] * part
                    marks = [1 if seam.modality == "image" else 2] * part
                    row += [107, *slots, 108] if wrapped else slots
                    kind += [0, *marks, 0] if wrapped else marks
            row.append(3)
            kind.append(0)
        words = list(range(5, 9 + index))
        rows.append(row + words)
        kinds.append(kind + [0] * len(words))
    ids, mask = pad_rows(rows, right)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    names = inspect.signature(type(model).forward).parameters
    types, _ = pad_rows(kinds, right, fill=0)
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = types
    if "token_type_ids" in names:
        inputs["token_type_ids"] = types.clamp(max=1)
    return inputs


def placeholder(model: Any, seam: Seam) -> int:
    """The token that the seam's features take the place of."""
    adapter = get_adapter(model)
    found = [getattr(model.config, name, None) for name in adapter.placeholders[seam.modality]]
    return int(next(token for token in found if token is not None))


def _words(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """A prompt without placeholders."""
    ids, mask = pad_rows([[BOS, *range(5, 9 + row)] for row in range(len(images))], right)
    return {"input_ids": ids, "attention_mask": mask}


def _attended(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """The same with masks that let every word see every picture of its row."""
    inputs = _words(model, seam, images, counts, right)
    shape = inputs["input_ids"].shape
    most = max([*images, 1])
    seen = torch.zeros(*shape, most, dtype=torch.long)
    for row, number in enumerate(images):
        seen[row, :, :number] = 1
    if model.config.model_type == "idefics":
        return {**inputs, "image_attention_mask": seen}
    return {**inputs, "cross_attention_mask": seen[..., None].repeat(1, 1, 1, 2)}


def _decoded(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Nothing but the decoder's start."""
    return {"decoder_input_ids": torch.tensor([[0, 5, 6]] * len(images))}


def _masked(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Places for the picture at the front, told by a mask."""
    number = counts[0] if counts else 0
    rows = [[BOS, *[3] * number, 4, *range(5, 9 + row)] for row in range(len(images))]
    places = [[0, *[1] * number, 0, *[0] * (4 + row)] for row in range(len(images))]
    ids, mask = pad_rows(rows, right)
    marked, _ = pad_rows(places, right, fill=0)
    return {"input_ids": ids, "attention_mask": mask, "image_embeds_position_mask": marked}


def _boxed(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Words with their boxes, and the decoder's start."""
    inputs = _words(model, seam, images, counts, True)
    boxes = torch.rand(*inputs["input_ids"].shape, 4, generator=torch.Generator().manual_seed(1))
    return {**inputs, "bbox": boxes, **_decoded(model, seam, images, counts, right)}


def _both(
    model: Any, seam: Seam, images: list[int], counts: list[int], right: bool
) -> dict[str, Any]:
    """Placeholders for the encoder, and the decoder's start."""
    placed = placeholders(model, seam, images, counts, right)
    return {**placed, **_decoded(model, seam, images, counts, right)}


SPLIT_FRAMES = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
    "cosmos3_omni",
    "cosmos3_edge",
    "cohere_compass",
    "glm4v",
    "glm46v",
    "glmga",
    "glm4v_moe",
    "glm_ocr",
    "glm5_next",
)
"""Families that write a time stamp in front of every frame."""

TEXT: dict[str, Any] = {
    "blip": _words,
    "florence2": _both,
    "git": _words,
    "idefics": _attended,
    "kosmos-2": _masked,
    "kosmos-2.5": _masked,
    "mllama": _attended,
    "pix2struct": _decoded,
    "pp_formulanet": _decoded,
    "t5gemma2": _both,
    "udop": _boxed,
    "vision-encoder-decoder": _decoded,
}
