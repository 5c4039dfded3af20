"""How an attacker's gradient crosses the quantiser of a guarded model.

| mode | forward value | gradient |
| --- | --- | --- |
| plain | the feature itself: no quantiser | exact |
| stopped | the codeword | exactly zero (the paper's threat model) |
| straight_through | the codeword | the identity (BPDA: Athalye et al. 2018, arXiv 1802.00420) |
| softmax | the codeword | of a softmax over the nearest codewords |

"plain" is for a model without a guard, where nothing has to be crossed, and for the control with
the quantiser removed. All modes go through `vqguard.quantizer.use_estimator`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vqguard.errors import ConfigError
from vqguard.quantizer import (
    Estimator,
    VectorQuantizer,
    straight_through_estimator,
    use_estimator,
)

GradientMode = Literal["plain", "stopped", "straight_through", "softmax"]

# elements of one block of the distance matrix: 64 MB of float32
_BLOCK = 16_000_000


def plain_estimator(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
    """The feature itself: as if there were no quantiser."""
    return features


def stopped_estimator(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
    """The codeword without a gradient: an argmin differentiated as it is."""
    return codewords.detach()[indices].to(features.dtype)


class _Surrogate(torch.autograd.Function):
    """The value of one tensor with the gradient of another, bit for bit."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


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

    Attributes:
        temperature: in units of the mean squared distance from the feature to its candidates
            (taken as a constant), so that one value fits any model.
        neighbours: how many nearest codewords take part; memory is (tokens, neighbours, d).

    Raises:
        ConfigError: temperature not positive, or fewer than two neighbours.
    """

    temperature: float = 0.1
    neighbours: int = 16

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
        output: Tensor = _Surrogate.apply(hard, soft.reshape(features.shape))
        return output

    def scale(self, features: Tensor, candidates: Tensor) -> Tensor:
        """(M, 1) the temperature in units of squared distance, without a gradient."""
        with torch.no_grad():
            distances = (features.unsqueeze(1) - candidates).square().sum(dim=-1)
            mean = distances.mean(dim=-1, keepdim=True)
            return self.temperature * mean.clamp_min(torch.finfo(features.dtype).tiny)


@dataclass(frozen=True)
class GradientPath:
    """A gradient mode with its settings.

    Attributes:
        mode: how the quantiser is crossed.
        temperature, neighbours: of the softmax mode, see `SoftmaxEstimator`.

    Raises:
        ConfigError: unknown mode or a setting out of range.
    """

    mode: GradientMode = "plain"
    temperature: float = 0.1
    neighbours: int = 16

    def __post_init__(self) -> None:
        if self.mode not in get_args(GradientMode):
            raise ConfigError(
                f"unknown gradient mode {self.mode!r}; choose one of {get_args(GradientMode)}"
            )
        SoftmaxEstimator(self.temperature, self.neighbours)

    def estimator(self) -> Estimator:
        """The estimator that `vqguard.quantizer.use_estimator` takes."""
        if self.mode == "plain":
            return plain_estimator
        if self.mode == "stopped":
            return stopped_estimator
        if self.mode == "straight_through":
            return straight_through_estimator
        return SoftmaxEstimator(self.temperature, self.neighbours)


@contextlib.contextmanager
def crossing(module: nn.Module, path: GradientPath | GradientMode) -> Iterator[None]:
    """Inside, gradients cross every quantiser in `module` by this path.

    The backward pass may run after the context: a graph keeps the estimator it was built with.

    Raises:
        ConfigError: the module has no quantiser and the mode needs one.
    """
    if isinstance(path, str):
        path = GradientPath(path)
    if not any(isinstance(part, VectorQuantizer) for part in module.modules()):
        if path.mode != "plain":
            raise ConfigError(
                f"gradient mode {path.mode!r} crosses a quantiser, but {type(module).__name__} "
                "has none; use 'plain' for an undefended model, or guard it first"
            )
        yield
        return
    with use_estimator(module, path.estimator()):
        yield
