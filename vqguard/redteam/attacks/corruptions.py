"""No attacker at all: noise, blur, JPEG, resizing and cropping, the baseline of every attack."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.trial import Trial


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


@dataclass(frozen=True, kw_only=True)
class Corruptions(Attack):
    """One corruption a step, from mild to strong, kept inside the budget like any attack."""

    name: ClassVar[str] = "corruptions"
    label: ClassVar[str] = "Corruptions (no attacker)"
    sentence: ClassVar[str] = (
        "Noise, blur, JPEG, resizing and cropping of growing strength: what breaks without anybody "
        "attacking."
    )
    measured: ClassVar[bool] = False

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        rounds = max(1, self.steps // 5)
        for number in range(rounds):
            strength = (number + 1) / rounds
            noise = torch.stack(
                [torch.randn(start.shape[1:], generator=g) for g in trial.generators]
            ).to(start)
            for changed in (
                start + noise * 0.25 * strength,
                blurred(start, 0.5 + 3.0 * strength),
                jpeg(start, max(5, round(90 * (1.0 - strength)))),
                resized(start, 1.0 - 0.75 * strength),
                cropped(start, 1.0 - 0.4 * strength),
            ):
                if trial.finished:
                    return
                trial.evaluate(trial.project(changed.clamp(0.0, 1.0)))
        trial.judge()
