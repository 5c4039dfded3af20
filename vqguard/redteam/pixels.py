"""Pixels in [0, 1]: the eps ball around an image, seeded starts in it, and rounding to 8 bits."""

from __future__ import annotations

import hashlib

import torch
from einops import rearrange
from torch import Tensor

from vqguard.errors import InputError


def check_images(images: Tensor) -> None:
    """Refuse anything but a finite float32 batch (B, 3, H, W) with values in [0, 1].

    Raises:
        InputError: naming what was expected and what came.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise InputError(
            f"expected images of shape (B, 3, H, W) with B, H, W >= 1, got {tuple(images.shape)}; "
            "stack RGB images in channels-first order"
        )
    if images.dtype != torch.float32:
        raise InputError(f"expected float32 images, got {images.dtype}; convert 8-bit with x / 255")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0.0 and high <= 1.0):  # a NaN fails this comparison too
        raise InputError(
            f"expected pixels in [0, 1], got values from {low} to {high}; attacks work on pixels "
            "before normalisation: scale by 1/255 and leave mean and std to the target"
        )


def to_8_bit(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to the nearest multiple of 1/255: what a PNG file can hold.

    Where the clean image is itself 8-bit and eps is a whole number of 1/255, rounding stays in the
    eps ball. Otherwise it may leave it by at most 0.5/255.
    """
    return pixels.mul(255.0).round().div(255.0)


def strip(pictures: Tensor) -> Tensor:
    """Pictures (B, K, 3, H, W) below one another: (B, 3, K H, W)."""
    return rearrange(pictures, "b k c h w -> b c (k h) w")


def pictures_of(strips: Tensor, count: int) -> Tensor:
    """The `count` pictures of each strip (B, 3, count H, W), one strip after another.

    Returns:
        (B count, 3, H, W).

    Raises:
        InputError: a height that is no multiple of `count`.
    """
    if strips.ndim != 4 or strips.shape[2] % count:
        raise InputError(
            f"expected strips (B, 3, {count} H, W) of {count} pictures, got {tuple(strips.shape)}"
        )
    return rearrange(strips, "b c (k h) w -> (b k) c h w", k=count)


def ball(clean: Tensor, eps_255: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest allowed pixel: the L-infinity ball of radius eps_255/255 cut by [0, 1]."""
    eps = eps_255 / 255.0
    return (clean - eps).clamp(0.0, 1.0), (clean + eps).clamp(0.0, 1.0)


def row_generators(clean: Tensor, seed: int, restart: int, key: Tensor) -> list[torch.Generator]:
    """One CPU generator for each row, which depends on that row alone.

    It is seeded by the seed, the restart, the row's key and the row's pixels, so an image gets the
    same draws alone and in any batch.

    Args:
        clean: (B, 3, H, W) float32 in [0, 1].
        seed: the attack's seed.
        restart: which restart.
        key: (B,) int64, the request that each row attacks.
    """
    pixels = clean.detach().cpu().contiguous()
    generators = []
    for row, request in enumerate(key.tolist()):
        digest = hashlib.blake2b(pixels[row].numpy().tobytes(), digest_size=8)
        digest.update(f"{seed}/{restart}/{request}".encode())
        # 63 bits: manual_seed takes a signed 64-bit number
        number = int.from_bytes(digest.digest(), "big") >> 1
        generators.append(torch.Generator().manual_seed(number))
    return generators


def random_start(clean: Tensor, eps_255: float, seed: int, restart: int, key: Tensor) -> Tensor:
    """A uniform point of the ball cut by [0, 1], one for each row, by `row_generators`.

    `eps_255` is the radius in 1/255.
    """
    noise = torch.stack(
        [
            torch.rand(clean.shape[1:], generator=generator)
            for generator in row_generators(clean, seed, restart, key)
        ]
    )
    low, high = ball(clean, eps_255)
    return low + noise.to(clean.device) * (high - low)
