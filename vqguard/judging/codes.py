"""Codes, masks and distances of judged tokens, checked before anything is concluded from them."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.verdict_rules import require_mask


def as_tokens(values: Tensor) -> Tensor:
    """(n, S) of values (n, S), or (n,) with one token an image."""
    return values[:, None] if values.dim() == 1 else values


def require_codes(
    codes: Tensor, mask: Tensor | None, distances: Tensor | None = None, *, cells: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (B, S) int64, mask and distances on the CPU; cell 0 stands at padding.

    Raises:
        InputError: for anything that is not that, and codes beyond the `cells`.
    """
    if codes.dtype != torch.int64 or codes.dim() != 2:
        raise InputError(
            f"expected int64 semantic codes of shape (images, tokens), got"
            f" {tuple(codes.shape)} {codes.dtype}"
        )
    if codes.shape[1] < 1:
        raise InputError("an image without a semantic token has no verdict")
    codes = codes.cpu()
    mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.cpu()
    require_mask(mask, tuple(codes.shape))
    codes = codes.masked_fill(~mask, 0)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < cells:
        raise InputError(
            f"semantic codes must lie in 0..{cells - 1}, got {int(codes.min())} to"
            f" {int(codes.max())}; the map belongs to another codebook"
        )
    return codes, mask, None if distances is None else require_distances(distances, mask)


def require_visual(visual: Tensor, images: int) -> Tensor:
    """Distances of the images' visual tokens, one an image, float64 (B,) on the CPU.

    Raises:
        InputError: unless there is one for each image, floating, not negative, no NaN.
    """
    if visual.shape != (images,) or not visual.is_floating_point():
        raise InputError(
            f"expected one distance of visual tokens for each of {images} images, floating,"
            f" got {tuple(visual.shape)} {visual.dtype}"
        )
    visual = visual.detach().double().cpu()
    if not bool((visual >= 0.0).all()):  # NaN too
        raise InputError("a distance to codewords is negative or NaN: no verdict follows from it")
    return visual


def require_distances(distances: Tensor, mask: Tensor) -> Tensor:
    """Distances of the tokens to their codewords, float64 (B, S) on the CPU; 0 at padding.

    Raises:
        InputError: unless they have the shape of the mask and are floating, not negative, no NaN.
    """
    if distances.shape != mask.shape or not distances.is_floating_point():
        raise InputError(
            f"expected distances, floating {tuple(mask.shape)}, got {tuple(distances.shape)}"
            f" {distances.dtype}"
        )
    distances = distances.detach().double().cpu().masked_fill(~mask, 0.0)
    if not bool((distances >= 0.0).all()):  # NaN too
        raise InputError("a distance to a codeword is negative or NaN: no verdict follows from it")
    return distances
