"""Where the visual tokens are in what a vision encoder returns: found from shapes."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from vqguard.errors import SeamError
from vqguard.regional.layout import grid_of

MAX_PREFIX = 16
"""More tokens than this before the grid are taken for another layout, not for registers."""


def flatten_map(features: Tensor, width: int, channels_last: bool | None = None) -> Tensor:
    """A feature map (B, d, h, w) or (B, h, w, d) with d = `width` as tokens (B, h * w, d).

    `channels_last` decides where both axes have that length.

    Raises:
        SeamError: where none has, or where both have and nothing decides.
    """
    first, last = features.shape[1] == width, features.shape[3] == width
    if first and last:
        if channels_last is None:
            raise SeamError(
                f"a feature map {tuple(features.shape)} may have its channels first or last; wrap "
                "the encoder in a function that returns tokens (images, tokens, width)"
            )
        last = channels_last
    elif not first and not last:
        raise SeamError(
            f"expected a feature map with {width} channels, got {tuple(features.shape)}; wrap the "
            "encoder in a function that returns tokens (images, tokens, width)"
        )
    return rearrange(features, "b h w d -> b (h w) d" if last else "b d h w -> b (h w) d")


def prefix_count(tokens: int, size: tuple[int, int], patch: int | None = None) -> int:
    """How many of `tokens` stand before the grid of an image of `size` (height, width) pixels.

    With the `patch` size the grid is known; otherwise, and for encoders that merge patches, it is
    the largest one that fits.

    Raises:
        SeamError: where no grid of at most `MAX_PREFIX` tokens fewer has the image's proportions.
    """
    if patch:
        grid = (size[0] // patch) * (size[1] // patch)
        if 0 <= tokens - grid <= MAX_PREFIX:
            return tokens - grid
    for prefix in range(min(MAX_PREFIX, tokens - 1) + 1):
        if grid_of(tokens - prefix, *size) is not None:
            return prefix
    raise SeamError(
        f"{tokens} tokens of an image of {size[0]} x {size[1]} pixels are no grid with a few class "
        "tokens before it; give global_token= and an encoder that returns its visual tokens only"
    )
