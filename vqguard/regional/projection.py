"""The semantic projection, computed to the last bit whatever stands beside it in the batch.

A matrix product rounds in an order that depends on the batch's shape, and a code must not. So both
factors are rounded to whole numbers, few enough in bits that every partial sum of their products
is a whole number below 2^53: float64 then adds without rounding, in whatever order. What is lost is
what the factors lose: about 2^-20 of a token's largest value at width 4096.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqguard.codebooks.full_precision import FullPrecision
from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.regional.layout import Layout, Windows

_EXACT = 53  # whole numbers up to 2^53 are exact in float64
FLOOR = -4.0
"""The logit of a category at which evidence begins: that of a region that shows nothing learnt."""
_RANGE = 900  # of exponents: powers of two beyond are no normal float64


class ExactLinear(FullPrecision):
    """x W^T + b, its value independent of batch, threads and device; `weight` (out, in) float32."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, width))
        self.bias = nn.Parameter(torch.zeros(out))

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Weights as `torch.nn.Linear` starts them, by a CPU generator, and no bias."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        drawn = torch.rand(self.weight.shape, generator=generator)
        self.weight.copy_((drawn * 2 - 1) * bound)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) float64 of finite x (..., in) of any float dtype; with gradient."""
        exact = self._exact(x.detach())
        if not torch.is_grad_enabled():
            return exact
        plain = nn.functional.linear(x.double(), self.weight.double(), self.bias.double())
        return with_gradient_of(plain, exact)

    def approximate(self, x: Tensor) -> Tensor:
        """The same as a plain product in the dtype of x: for training, where speed counts."""
        product: Tensor = nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return product

    def _exact(self, x: Tensor) -> Tensor:
        bits = (_EXACT - math.ceil(math.log2(self.weight.shape[1]))) // 2
        rows, row_power = _whole(x.double(), bits)
        columns, column_power = _whole(self.weight.detach().double(), bits)
        product = (rows @ columns.T) * _power_of_two(row_power) * _power_of_two(column_power).T
        return product + self.bias.detach().double()

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class SemanticProjection(nn.Module):
    """Visual tokens (N, d) -> semantic tokens of regions (S, r).

    A layer with ReLU for each token, the mean over each region, and two such layers for the region:
    what comes out is not negative, and 0 where the region shows nothing that was learnt.
    """

    def __init__(self, dim: int, hidden: int, width: int, sides: tuple[int, ...], seed: int):
        super().__init__()
        self.windows = Windows(sides)
        self.tokens = ExactLinear(dim, hidden)
        self.regions = ExactLinear(hidden, hidden)
        self.semantic = ExactLinear(hidden, width)
        self.start(seed, width)

    @torch.no_grad()
    def start(self, seed: int, used: int) -> None:
        """Start again, at random; all but the first `used` numbers of a semantic token are 0."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.tokens, self.regions, self.semantic):
            layer.start(generator)
        self.semantic.weight[used:] = 0.0

    def forward(self, tokens: Tensor, layout: Layout | None) -> Tensor:
        """(B, S, r) float32 of images (B, N, d) that share a layout, with gradient.

        An image's are the same alone and in a batch, bit for bit.
        """
        pooled = self.windows.pool(self.tokens(tokens).relu(), layout)
        evidence: Tensor = self.semantic(self.regions(pooled).relu()).relu()
        return evidence.float()

    def approximate(self, tokens: Tensor, layout: Layout | None) -> Tensor:
        """The same by plain products, before the last ReLU: for training."""
        pooled = self.windows.pool(self.tokens.approximate(tokens).relu(), layout)
        return self.semantic.approximate(self.regions.approximate(pooled).relu())


def _whole(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most so many bits, and the power of two (..., 1) that scales them back.

    The scale is that of each row's largest value: it depends on nothing else.
    """
    exponent = torch.frexp(x.abs().amax(dim=-1, keepdim=True)).exponent.clamp(-_RANGE, _RANGE)
    return (x * _power_of_two(bits - exponent)).round(), exponent - bits


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exact: `torch.pow` may round."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)
