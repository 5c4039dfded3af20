"""Noisy or cropped copies of pictures, for verdicts by majority.

What chance decides about a picture is drawn from its own values: the same picture has the same
copies, and so the same verdict, whenever it is shown and whatever else is in the batch. Where
pixels come as rows of patches (Qwen-VL, ...), each row has noise of its own, and nothing can be
cropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vqguard.config import SmoothingSettings
from vqguard.errors import ConfigError


def noisy_copies(
    names: Iterable[str], arguments: Mapping[str, Any], settings: SmoothingSettings
) -> Iterator[dict[str, Any]]:
    """The arguments, as often as there are copies, with the pixels of these names changed.

    First cropped, then noisy, as `settings` say; with the gradient of both. Values that are exactly
    zero get no noise: so does padding, which nothing may be shown in.

    Raises:
        ConfigError: crops of pixels that are not whole pictures (B, C, H, W).
    """
    shown = {name: arguments[name] for name in names if arguments.get(name) is not None}
    generators = {name: _generators(pixels) for name, pixels in shown.items()}
    for _ in range(settings.copies):
        changed = {
            name: _changed(pixels, generators[name], settings) for name, pixels in shown.items()
        }
        yield {**arguments, **changed}


def _changed(pixels: Any, generators: Any, settings: SmoothingSettings) -> Any:
    if isinstance(pixels, (list, tuple)):
        pairs = zip(pixels, generators, strict=True)
        return type(pixels)(_changed(part, own, settings) for part, own in pairs)
    if settings.crop > 0.0:
        pixels = _cropped(pixels, generators, settings.crop)
    if settings.noise == 0.0:
        return pixels
    noise = torch.stack([torch.randn(pixels.shape[1:], generator=own) for own in generators])
    changed: Tensor = pixels + settings.noise * noise.to(pixels) * (pixels != 0)
    return changed


def _cropped(pixels: Tensor, generators: Any, crop: float) -> Tensor:
    """Pictures (B, C, H, W) without a share of each side, enlarged to what they were."""
    if pixels.dim() != 4:
        raise ConfigError(
            f"smoothing.crop needs pictures (B, C, H, W), and this family's pixels are"
            f" {tuple(pixels.shape)}: set it to 0 and use smoothing.noise"
        )
    sides = pixels.shape[2:]
    kept = [max(1, round((1.0 - crop) * side)) for side in sides]
    parts = []
    for picture, own in zip(pixels, generators, strict=True):
        top, left = (
            int(torch.randint(0, side - rest + 1, (1,), generator=own))
            for side, rest in zip(sides, kept, strict=True)
        )
        parts.append(picture[:, top : top + kept[0], left : left + kept[1]])
    return functional.interpolate(
        torch.stack(parts), size=sides, mode="bilinear", align_corners=False
    )


def _generators(pixels: Any) -> Any:
    """One CPU generator for each leading row, seeded by SHA-256 of its values in float32."""
    if isinstance(pixels, (list, tuple)):
        return [_generators(part) for part in pixels]
    rows = pixels.detach().to("cpu", torch.float32).contiguous().numpy()
    seeds = (hashlib.sha256(row.tobytes()).digest() for row in rows)
    # 63 bits: manual_seed takes a signed 64-bit number
    return [torch.Generator().manual_seed(int.from_bytes(s[:8], "big") >> 1) for s in seeds]
