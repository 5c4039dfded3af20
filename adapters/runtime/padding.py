"""Marks of padding over pixels that show something are refused.

A family leaves what is marked as padding out of its global token, or out of the pictures that are
judged; some show it to the language model all the same. Processors fill padding with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.seams import Seam
from vqguard.errors import BypassError

Mark = Callable[[Tensor], Tensor]
"""What a processor returns -> bool, true where there is a picture."""


def _mask(mark: Tensor) -> Tensor:
    if not bool(((mark == 0) | (mark == 1)).all()):
        # Other numbers scale or turn round what attention makes of it.
        raise BypassError(
            f"expected a mask of zeros and ones, got values from {mark.min()} to {mark.max()}; "
            "pass masks as the model's processor returns them"
        )
    return mark != 0


def _ids(mark: Tensor) -> Tensor:
    return mark != 0


def _placed(positions: Tensor) -> Tensor:
    return ~(positions == -1).all(-1)


MARKS: dict[str, Mark] = {
    "pixel_attention_mask": _mask,
    "pixel_mask": _mask,
    "aspect_ratio_mask": _mask,
    "aspect_ratio_ids": _ids,
    "image_position_ids": _placed,
    "video_position_ids": _placed,
}
"""Marks by the name of their argument."""
PATCH_MARKS = {"flattened_patches": "attention_mask"}
"""The mark of pixels that come as padded rows of patches."""


def require_shown(seam: Seam, arguments: Mapping[str, Any]) -> None:
    """Raise `BypassError` where pixels that are not zero are marked as padding.

    `arguments`: the seam's. A mark lies over pixels by their leading dimensions, or by all but the
    colours (..., C, H, W).
    """
    for pixels_name in seam.pixels:
        pixels = arguments.get(pixels_name)
        if not isinstance(pixels, Tensor) or pixels.is_meta:
            continue
        marks = dict(MARKS)
        if pixels_name in PATCH_MARKS:
            marks[PATCH_MARKS[pixels_name]] = _mask
        for name, real in marks.items():
            mark = arguments.get(name)
            if mark is None or name.startswith("video_") != ("video" in pixels_name):
                continue
            _require_zero(pixels_name, pixels, name, real(torch.as_tensor(mark)))


def _require_zero(pixels_name: str, pixels: Tensor, name: str, real: Tensor) -> None:
    shape = tuple(pixels.shape)
    if tuple(real.shape) == shape[: real.dim()]:
        over = real.reshape(*real.shape, *[1] * (pixels.dim() - real.dim()))
    elif pixels.dim() >= 4 and tuple(real.shape) == (*shape[:-3], *shape[-2:]):
        over = real.unsqueeze(-3)
    else:
        raise BypassError(
            f"expected {name} to lie over {pixels_name} {shape}, got {tuple(real.shape)}: what is "
            "padding cannot be told; pass both as the model's processor returns them"
        )
    hidden = (pixels != 0) & ~over.to(pixels.device)
    if bool(hidden.any()):
        raise BypassError(
            f"{name} marks {int(hidden.sum())} values of {pixels_name} as padding that are not "
            "zero: a picture could be shown there that is not judged; pass both as the model's "
            "processor returns them"
        )
