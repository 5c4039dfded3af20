"""The gradient of a softmax over the nearest codewords, in place of the argmin's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.errors import ConfigError
from vqguard.redteam.modes import GradientMode
from vqguard.redteam.threat import ThreatModel

# elements of one block of the distance matrix: 64 MB of float32
_BLOCK = 16_000_000


def nearest_candidates(features: Tensor, codewords: Tensor, neighbours: int) -> Tensor:
    """(M, k) int64 indices of the k nearest codewords of each feature, in blocks of bounded memory.

    Args:
        features: (M, d).
        codewords: (P, d).
        neighbours: k; all codewords if there are fewer.
    """
    rows = max(1, _BLOCK // len(codewords))
    count = min(neighbours, len(codewords))
    with torch.no_grad():
        words = codewords.float()
        return torch.cat(
            [
                torch.cdist(some.float(), words).topk(count, largest=False).indices
                for some in torch.split(features.detach(), rows)
            ]
        )


def relaxed_codeword(features: Tensor, candidates: Tensor, temperature: Tensor) -> Tensor:
    """(M, d) mean of the candidates (M, k, d), weighted by softmax(-||x - e||^2 / temperature).

    `temperature` (M, 1) is in units of squared distance. Differentiable in the features.
    """
    distances = (features.unsqueeze(1) - candidates).square().sum(dim=-1)
    weights = torch.softmax(-distances / temperature, dim=-1)
    return torch.einsum("mk,mkd->md", weights, candidates)


@dataclass(frozen=True)
class SoftmaxEstimator:
    """The codeword, with the gradient of a softmax over the nearest codewords.

    Raises:
        ConfigError: temperature not positive, or fewer than two neighbours.
    """

    temperature: float = 0.1
    """In units of the mean squared distance from the feature to its candidates (taken as a
    constant), so that one value fits any model."""
    neighbours: int = 16
    """How many nearest codewords take part; memory is (tokens, neighbours, d)."""

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}")
        if self.neighbours < 2:
            raise ConfigError(
                f"neighbours must be at least 2, got {self.neighbours}: with one codeword the "
                "softmax is constant and its gradient zero"
            )

    def __call__(self, features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
        """Features (..., d), codewords (P, d), indices (...) int64 -> (..., d)."""
        flat = features.reshape(-1, features.shape[-1])
        words = codewords.detach()
        candidates = words[nearest_candidates(flat, words, self.neighbours)].to(flat.dtype)
        soft = relaxed_codeword(flat, candidates, self.scale(flat, candidates))
        hard = words[indices].to(features.dtype)
        return with_gradient_of(soft.reshape(features.shape), hard)

    def scale(self, features: Tensor, candidates: Tensor) -> Tensor:
        """(M, 1) the temperature in units of squared distance, without a gradient."""
        with torch.no_grad():
            distances = (features.unsqueeze(1) - candidates).square().sum(dim=-1)
            mean = distances.mean(dim=-1, keepdim=True)
            return self.temperature * mean.clamp_min(torch.finfo(features.dtype).tiny)


SOFTMAX = GradientMode(
    name="softmax",
    label="softmax relaxation (adaptive)",
    threat_model=ThreatModel.SOFTMAX,
    estimator=SoftmaxEstimator(),
    measured=False,
)
