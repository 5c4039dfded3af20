"""Noisy copies of pictures, for verdicts by majority.

The noise of a picture is drawn from its own values: the same picture has the same copies, and so
the same verdict, whenever it is shown and whatever else is in the batch. Where pixels come as rows
of patches (Qwen-VL, ...), each row has noise of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vqguard.config import SmoothingSettings


def noisy_copies(
    names: Iterable[str], arguments: Mapping[str, Any], settings: SmoothingSettings
) -> Iterator[dict[str, Any]]:
    """The arguments, as often as there are copies, with noise on the pixels of these names.

    Values that are exactly zero stay: so does padding, which nothing may be shown in.
    """
    shown = {name: arguments[name] for name in names if arguments.get(name) is not None}
    generators = {name: _generators(pixels) for name, pixels in shown.items()}
    for _ in range(settings.copies):
        changed = {
            name: _with_noise(pixels, generators[name], settings.noise)
            for name, pixels in shown.items()
        }
        yield {**arguments, **changed}


def _with_noise(pixels: Any, generators: Any, spread: float) -> Any:
    if isinstance(pixels, (list, tuple)):
        pairs = zip(pixels, generators, strict=True)
        return type(pixels)(_with_noise(part, own, spread) for part, own in pairs)
    noise = torch.stack([torch.randn(pixels.shape[1:], generator=own) for own in generators])
    changed: Tensor = pixels + spread * noise.to(pixels) * (pixels != 0)
    return changed


def _generators(pixels: Any) -> Any:
    """One CPU generator for each leading row, seeded by SHA-256 of its values in float32."""
    if isinstance(pixels, (list, tuple)):
        return [_generators(part) for part in pixels]
    rows = pixels.detach().to("cpu", torch.float32).contiguous().numpy()
    seeds = (hashlib.sha256(row.tobytes()).digest() for row in rows)
    # 63 bits: manual_seed takes a signed 64-bit number
    return [torch.Generator().manual_seed(int.from_bytes(s[:8], "big") >> 1) for s in seeds]
