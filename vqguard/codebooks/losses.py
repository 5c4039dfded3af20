"""The losses of the quantiser, as pure functions.

The paper (arXiv 2511.16229) writes squared norms: L_codebook = |q(x) - sg[x]|^2,
L_commit = |x - sg[q(x)]|^2, L_vq = L_codebook + 0.25 L_commit and
L_semantic = |q(h_cls) - H_caption|^2.
Each is reduced here by the mean over all elements, as in the code of VQ-VAE (van den Oord et al.
2017): the squared norm grows with the width d, so that a sum would need other weights for every
model. With the mean, the paper's 0.5, 0.25 and 0.1 keep their sense at any width and token count.

All are computed in float32 (float64 inputs stay float64). Raises InputError when shapes differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.errors import InputError


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


def _mean_square(left: Tensor, right: Tensor) -> Tensor:
    if left.shape != right.shape:
        raise InputError(
            f"a loss compares tensors of one shape, got {tuple(left.shape)} and"
            f" {tuple(right.shape)}"
        )
    if left.dtype != torch.float64:
        left = left.float()
    if right.dtype != torch.float64:
        right = right.float()
    return (left - right).square().mean()


def codebook_loss(x: Tensor, q: Tensor) -> Tensor:
    """|q - sg[x]|^2, mean over elements: moves the codewords to the features.

    `x` features (..., d), `q` their codewords (..., d) taken from the codebook with gradient.
    """
    return _mean_square(q, x.detach())


def commitment_loss(x: Tensor, q: Tensor) -> Tensor:
    """|x - sg[q]|^2, mean over elements: moves the features to their codewords (..., d)."""
    return _mean_square(x, q.detach())


def semantic_loss(q_cls: Tensor, caption: Tensor) -> Tensor:
    """|q(h_cls) - sg[H_caption]|^2, mean over elements; both (..., d).

    The caption's hidden state is a target: the language model is frozen in stage 1, so no gradient
    goes to it.
    """
    return _mean_square(q_cls, caption.detach())
