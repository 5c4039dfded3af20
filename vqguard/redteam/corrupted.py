"""Corruptions of pictures (B, 3, H, W), float32 in [0, 1]: JPEG, blur, resizing and cropping."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def jpeg(pixels: Tensor, quality: int) -> Tensor:
    """(B, 3, H, W) float32 in [0, 1] through JPEG at this quality."""
    out = []
    for image in (pixels * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as read:
            out.append(torch.from_numpy(np.array(read.convert("RGB"))))
    return (torch.stack(out).permute(0, 3, 1, 2).float() / 255.0).to(pixels.device)


def blurred(pixels: Tensor, sigma: float) -> Tensor:
    """(B, 3, H, W) through a Gaussian of `sigma` pixels."""
    reach = max(1, round(3.0 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pixels, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=3).clamp(0.0, 1.0)


def resized(pixels: Tensor, share: float) -> Tensor:
    """(B, 3, H, W) made smaller by `share` and large again."""
    height, width = pixels.shape[2:]
    small = max(1, round(height * share)), max(1, round(width * share))
    smaller = F.interpolate(pixels, small, mode="bilinear", antialias=True)
    return F.interpolate(smaller, (height, width), mode="bilinear").clamp(0.0, 1.0)


def cropped(pixels: Tensor, share: float) -> Tensor:
    """(B, 3, H, W): the middle `share` of each side, at the old size."""
    height, width = pixels.shape[2:]
    top, left = round(height * (1.0 - share) / 2.0), round(width * (1.0 - share) / 2.0)
    middle = pixels[:, :, top : height - top, left : width - left]
    return F.interpolate(middle, (height, width), mode="bilinear").clamp(0.0, 1.0)
