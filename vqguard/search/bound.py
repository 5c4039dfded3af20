"""A lower bound on all distances from one narrow matrix product. docs/search-margins.md derives it.

Codewords and queries are centred (z = e - c, y = x - c) and described by r coordinates with respect
to a matrix W (d, r) that is nearly orthonormal: b for a codeword, p for a query, in float32 or
bfloat16. What the coordinates leave out is bounded by lengths that were measured, and what rounding
may have done to them by lengths times proven factors. No property of W but its measured extreme
singular values is relied upon, so how W was found decides speed alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.search.precision import full_precision

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
_INFLATE = 1.0 + 2.0**-20
"""Covers the at most nine float32 roundings by which the compiled loop sums a bound (9 2^-24)."""
_TINY = 2.0**-125
_ROWS = 1024
_SAMPLE = 4096
_ROUNDS = 2


def gamma(terms: int, unit: float = 2.0**-24) -> float:
    """The bound n u / (1 - n u): relative error of a sum of products after n roundings."""
    return terms * unit / (1.0 - terms * unit)


class QueryTerms(NamedTuple):
    """What the compiled loop needs of m queries (see `kernels.refine`)."""

    factors: Tensor
    """(m, 1 or 2) float32: lengths that multiply `CodewordBound.columns`."""
    limits: Tensor
    """(m, 3) float64: |y|^2 from below, miss of the centring, absolute slack."""
    usable: Tensor
    """(m,) bool: False where float32 might overflow."""


class CodewordBound:
    """Coordinates of P codewords (P, d) float32, and the lengths that bound what they leave out."""

    def __init__(self, codewords: Tensor, axes: Tensor | None, dtype: torch.dtype) -> None:
        """`axes` (d, r) float32 nearly orthonormal columns; None: all of d, without a rotation.

        `dtype` float32 or bfloat16 of the coordinates.

        Raises:
            ValueError: when the axes are too far from orthonormal for the bound to mean anything.
        """
        codes, dim = codewords.shape
        self.dim, self.dtype = dim, dtype
        self.centre = codewords.double().mean(dim=0).float()
        self.axes = None if axes is None else axes.to(dtype)
        self.rank = dim if axes is None else axes.shape[1]
        self.coordinates = torch.empty(codes, self.rank, dtype=dtype)
        self.half = torch.empty(codes, dtype=torch.float32)
        # |b| + beta, beta and rho of docs/search-margins.md
        lengths = torch.empty(3, codes, dtype=torch.float64)
        self.coarse = 2.0**-20
        if dtype == torch.bfloat16:
            self.coarse += UNIT[dtype] / (1.0 - UNIT[dtype])
        self.largest = 0.0
        self._frobenius, self._low, self._high = 1.0, 1.0, 1.0
        self._solve: Tensor | None = None
        if self.axes is not None:
            self._measure_axes(self.axes.double())
        for start in range(0, codes, _ROWS):
            self._describe(codewords, slice(start, start + _ROWS), lengths)
        # any weight is right; this one makes the two products about as large as their sum
        share = lengths[1] / lengths[0].clamp_min(1e-300)
        self._weight = float(share.median()) + gamma(self.rank + 8)
        columns = [self._weight * lengths[0] + lengths[1]]
        if axes is not None:
            columns.append(lengths[2])
        self.columns = (torch.stack(columns) * _INFLATE).float()

    def _measure_axes(self, axes: Tensor) -> None:
        gram = axes.T @ axes
        excess = gram - torch.eye(self.rank, dtype=torch.float64)
        fourth = torch.linalg.matrix_power(excess, 4)
        # the spectral norm of a symmetric A is at most |A^4|_F^(1/4)
        spread = float(torch.linalg.matrix_norm(fourth)) ** 0.25 * (1.0 + 1e-9) + 1e-11
        if not spread < 0.5:
            raise ValueError(f"axes are not orthonormal: |W'W - I| may be {spread:.2g}")
        self._low, self._high = 1.0 - spread, 1.0 + spread  # squared singular values
        self._frobenius = float(axes.square().sum().sqrt()) * (1.0 + 1e-9)
        self._solve = (axes @ torch.linalg.inv(gram)).float()

    def _describe(self, codewords: Tensor, piece: slice, lengths: Tensor) -> None:
        z32 = codewords[piece] - self.centre
        z = z32.double()
        length = z.square().sum(dim=1).sqrt()
        self.largest = max(self.largest, float(length.max()) * (1.0 + 1e-9))
        if self.axes is None or self._solve is None:
            b = z32.to(self.dtype)
            wrong = (z - b.double()).square().sum(dim=1).sqrt()
            outside = torch.zeros_like(wrong)
        else:
            b = (z32 @ self._solve).to(self.dtype)
            axes = self.axes.double()
            rest = z - b.double() @ axes.T
            inside = (rest @ axes).square().sum(dim=1).sqrt()
            outside = (rest.square().sum(dim=1) - inside.square() / self._high).clamp_min(0).sqrt()
            wrong = inside / self._low
            # of the float64 products above
            factor = (self.dim + self.rank + 32) * 2.0**-53 * (1.0 + self._frobenius) ** 2
            error = factor * (length + b.double().square().sum(dim=1).sqrt())
            wrong, outside = wrong + error, outside + error
        self.coordinates[piece] = b
        known = b.double().square().sum(dim=1).sqrt()
        self.half[piece] = (0.5 * length.square() / _INFLATE).float()
        lengths[:, piece] = torch.stack([known + wrong, wrong, outside])

    def query_terms(self, squares: Tensor, lost: Tensor, known: Tensor) -> QueryTerms:
        """All float64 (m,): |y|^2, |y - y'|^2 of the rounded y', |p|^2 of the coordinates."""
        exact = (self.dim + 16) * 2.0**-53
        length, p = (squares * (1.0 + exact)).sqrt(), (known * (1.0 + exact)).sqrt()
        rounded = (lost * (1.0 + exact)).sqrt()
        if self.axes is None:
            delta, outside = rounded, torch.zeros_like(p)
        else:
            unit = UNIT[self.dtype] if self.dtype == torch.bfloat16 else 0.0
            high = math.sqrt(self._high)
            delta = high * rounded + gamma(self.dim + 8) * self._frobenius * (length + rounded)
            delta += unit / (1.0 - unit) * p
            flushed = self.dim + math.sqrt(self.dim) * (length + rounded + high) + 1.0
            delta += _TINY * math.sqrt(self.rank) * flushed
            inside = (p - delta).clamp_min(0.0).square() / self._high
            outside = (squares * (1.0 + 4.0 * exact) - inside).clamp_min(0.0).sqrt()
        # a c + p b <= f (w c + b) for f = max(p, a / w): one product in place of two
        first = torch.maximum(p, (delta + gamma(self.rank + 8) * p) / self._weight)
        factors = torch.stack([first] if self.axes is None else [first, outside], dim=1)
        reach = length + self.largest
        miss = 2.0**-24 * (1.0 + 1e-6) * reach + _TINY * math.sqrt(self.dim)
        slack = _TINY * (self.rank + 8.0 + math.sqrt(self.rank) * (p + 2.0 * self.largest))
        limits = torch.stack([squares * (1.0 - exact), miss, slack], dim=1)
        usable = reach.square() < 2.0**120
        return QueryTerms((factors * _INFLATE).float(), limits, usable)


def principal_axes(codewords: Tensor, rank: int, seed: int = 0) -> Tensor:
    """Leading principal axes (d, rank) float32 of codewords (P, d), by subspace iteration.

    Halko, Martinsson and Tropp, SIAM Review 53 (2011), on at most 4096 rows. In order of variance.
    """
    codes, dim = codewords.shape
    generator = torch.Generator().manual_seed(seed)
    rows = codewords
    if codes > _SAMPLE:
        rows = codewords[torch.randperm(codes, generator=generator)[:_SAMPLE]]
    rows = rows - rows.mean(dim=0)
    scale = rows.abs().max().clamp_min(2.0**-100)
    rows = rows / scale
    with full_precision(codewords.device):
        axes: Tensor = torch.linalg.qr(torch.randn(dim, rank, generator=generator)).Q
        for _ in range(_ROUNDS):
            axes = torch.linalg.qr(rows.T @ (rows @ axes)).Q
        seen = rows @ axes
        order: Tensor = torch.linalg.eigh((seen.T @ seen).double()).eigenvectors.flip(1).float()
        return (axes @ order).contiguous()
