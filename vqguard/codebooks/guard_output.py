"""What a guard returns, and how its quantisers are asked about batches of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqguard.codebooks.losses import GuardLosses
from vqguard.codebooks.quantizer import Quantized, VectorQuantizer
from vqguard.search.settle import tree_sum

PADDING = -1
"""No code: whoever reads padding as a token is refused."""


class Judged(NamedTuple):
    """What a verdict on B images is read from: the codes of the level that judges."""

    codes: Tensor
    """(B, S) int64; -1 at padding."""
    mask: Tensor | None
    """(B, S) bool, True for an image's own tokens; None where none is padding."""
    distances: Tensor | None
    """(B, S) float64, how far each token is from its codeword; 0 at padding."""
    visual: Tensor | None = None
    """(B,) float64, how far the image's visual tokens are from their codewords in the patch
    codebook (`power_means`); None where nobody asked."""


class GuardOutput(NamedTuple):
    """What the guard returns, always in this shape; lists where `tokens` came as a list."""

    tokens: Tensor | list[Tensor]
    """(B, N, d) codewords, or one (N_i, d) an image; the input's dtype."""
    codes: Tensor | list[Tensor]
    """(B, N) int64 patch codes, or one (N_i,) an image."""
    semantic_tokens: Tensor
    """(B, S, d_s) semantic codewords; zeros at padding."""
    semantic_codes: Tensor
    """(B, S) int64 semantic codes; -1 at padding, which no safety map takes for a code."""
    flagged: Tensor | None
    """(B,) bool verdicts; None without a safety map, while the semantic codebook learns, and
    `unjudged`."""
    losses: GuardLosses | None
    """While all levels learn (see `VectorQuantizer`), else None."""
    deep: tuple[Tensor | list[Tensor], ...] = ()
    """Codewords of the deep-stack levels, each in the form of `tokens`."""
    semantic_mask: Tensor | None = None
    """(B, S) bool, True for an image's own semantic tokens; None where none is padding."""
    deep_codes: tuple[Tensor | list[Tensor], ...] = ()
    """int64 codes of the deep-stack levels, each in the form of `codes`."""
    judged_distances: Tensor | None = None
    """(B, S) float64, how far each judged token is from its codeword, 0 at padding; None where the
    safety map calls no image unfamiliar."""
    regional_codes: Tensor | None = None
    """(B, R) int64 codes of its regions, -1 at padding; None where the judge is global."""
    regional_mask: Tensor | None = None
    """(B, R) bool, True for an image's own regions; None where none is padding."""
    layouts: tuple[Any, ...] | None = None
    """Where each image's tokens lie (`vqguard.regional.layout.Layout`), as it was given."""

    smoothed: Judged | None = None
    """What the verdict is read from in place of these codes, where noisy copies are judged."""
    visual_distances: Tensor | None = None
    """(B,) float64, how far the visual tokens are from their codewords (`power_means`); None where
    the safety map does not call images unfamiliar by that."""

    @property
    def judged(self) -> Judged:
        """What the verdict is read from; distances only where the safety map asks for them."""
        if self.smoothed is not None:
            return self.smoothed
        far = self.judged_distances, self.visual_distances
        if self.regional_codes is None:
            return Judged(self.semantic_codes, self.semantic_mask, *far)
        return Judged(self.regional_codes, self.regional_mask, *far)


def encode_real(
    quantizer: VectorQuantizer, features: Tensor, mask: Tensor | None, *, seen: bool = False
) -> Tensor:
    """Codes (B, S) int64 of features (B, S, w); -1 where the mask says padding.

    `seen`: the estimator that is in force, if any, is shown the features: an attacker reads them.
    """

    def encode(real: Tensor) -> Tensor:
        return quantizer.replace(real)[1] if seen else quantizer.encode(real)

    if mask is None:
        return encode(features)
    codes = torch.full(mask.shape, PADDING, device=features.device)
    codes[mask] = encode(features[mask])
    return codes


def distances_of(quantizer: VectorQuantizer, features: Tensor, codes: Tensor) -> Tensor:
    """Euclidean distances float64 (B, S) of features (B, S, w) to their codewords; 0 at padding.

    The same for an image alone and in a batch, bit for bit.
    """
    real = codes >= 0
    codewords = quantizer.lookup(codes[real], torch.float64)
    apart = features.detach()[real].double() - codewords.detach().to(features.device)
    out = torch.zeros(codes.shape, dtype=torch.float64, device=features.device)
    out[real] = tree_sum(apart.square()).sqrt()
    return out


def power_means(
    quantizer: VectorQuantizer,
    tokens: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
) -> Tensor:
    """(B,) float64: over each image's visual tokens, the power mean of `distances_of`.

    That is (mean of distance^8)^(1/8): between the mean, which a small strange thing hardly moves,
    and the furthest token, which any picture may have. `tokens` (B, N, d) or (N_i, d) an image,
    `codes` (B, N) or (N_i,). 0 for an image without any. The same for an image alone and in a
    batch, bit for bit: squares and square roots are exact to the last bit wherever they are taken.
    """
    means = []
    for image, own in zip(tokens, codes, strict=True):
        apart = distances_of(quantizer, image[None], own[None].to(image.device))
        mean = tree_sum(apart.square().square().square()) / len(own) if len(own) else apart.sum(1)
        means.append(mean.sqrt().sqrt().sqrt())
    return torch.cat(means)


def quantise_images(
    quantizer: nn.Module, tokens: Tensor | Sequence[Tensor]
) -> tuple[Quantized, Tensor | list[Tensor], Tensor | list[Tensor]]:
    """What a quantiser makes of tokens in either form, and its output and codes in that form."""
    if isinstance(tokens, Tensor):
        quantized: Quantized = quantizer(tokens)
        return quantized, quantized.output, quantized.indices
    sizes = [image.shape[0] for image in tokens]
    quantized = quantizer(torch.cat(list(tokens)))
    return (
        quantized,
        list(torch.split(quantized.output, sizes)),
        list(torch.split(quantized.indices, sizes)),
    )
