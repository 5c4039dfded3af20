"""What the guard returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GuardLosses(NamedTuple):
    """The four losses of stage 1: scalars, means over elements, not yet weighted."""

    patch_codebook: Tensor
    patch_commitment: Tensor
    semantic_codebook: Tensor
    semantic_commitment: Tensor
    commitment_weight: float = 0.25

    @property
    def vq_patch(self) -> Tensor:
        """L_vq of the patch level: L_codebook + weight * L_commit."""
        return self.patch_codebook + self.commitment_weight * self.patch_commitment

    @property
    def vq_semantic(self) -> Tensor:
        """L_vq of the semantic level."""
        return self.semantic_codebook + self.commitment_weight * self.semantic_commitment

    def total(self, beta: float | None = None) -> Tensor:
        """L_vq of both levels together; `beta` replaces the configured commitment weight."""
        losses = self if beta is None else self._replace(commitment_weight=beta)
        return losses.vq_patch + losses.vq_semantic


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
