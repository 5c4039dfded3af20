"""A lower bound on all distances from one narrow matrix product. docs/search-margins.md derives it.

Codewords and queries are centred (z = e - c, y = x - c) and described by r coordinates with respect
to a matrix W (d, r) that is nearly orthonormal: b for a codeword, p for a query, in float32,
bfloat16, or int8 with a scale a row. What the coordinates leave out is bounded by lengths that were
measured, and what rounding may have done to them by lengths times proven factors. No property of W
but its measured extreme singular values is relied upon, so how W was found decides speed alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.search.precision import full_precision

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
INFLATE = 1.0 + 2.0**-20
"""Covers the at most nine float32 roundings by which the compiled loop sums a bound (9 2^-24)."""
_TINY = 2.0**-125
LEVELS = 127
"""Largest coordinate in int8."""
LEAST_SCALE = 2.0**-100
"""Rows with a smaller scale have no coordinates but zeros: their inverse could overflow."""
_ROWS = 1024
_SAMPLE = 4096
_ROUNDS = 2


def gamma(terms: int, unit: float = 2.0**-24) -> float:
    """The bound n u / (1 - n u): relative error of a sum of products after n roundings."""
    return terms * unit / (1.0 - terms * unit)


class QueryLengths(NamedTuple):
    """Squared lengths of m queries, float64 (m,) each: y the centred query, y' what is multiplied.

    p = W'y' are its coordinates, p' those that meet the codewords': p itself, or rounded to int8.
    """

    centred: Tensor
    """|y|^2."""
    lost: Tensor
    """|y - y'|^2."""
    known: Tensor
    """|p|^2."""
    dropped: Tensor
    """|p - p'|^2."""
    kept: Tensor
    """|p'|^2."""


class QueryTerms(NamedTuple):
    """What the compiled loop needs of m queries (see `refine.refine`)."""

    factors: Tensor
    """(m, 4) float32: two lengths that multiply the codewords', scale, error of a product."""
    limits: Tensor
    """(m, 4) float64: |y|^2 from below, miss of the centring, absolute slack, |y| from above."""
    usable: Tensor
    """(m,) bool: False where float32 might overflow."""


class _Basis(NamedTuple):
    """Axes W (d, r) in float64, W'W - I and the inverse of W'W (r, r)."""

    axes: Tensor
    excess: Tensor
    inverse: Tensor


class CodewordBound:
    """Coordinates of P codewords (P, d) float32, and the lengths that bound what they leave out."""

    def __init__(self, codewords: Tensor, axes: Tensor | None, dtype: torch.dtype) -> None:
        """`axes` (d, r) nearly orthonormal columns; None: all of d, without a rotation.

        `dtype` float32, bfloat16 or int8 of the coordinates. The queries are rotated in that type,
        and for int8 in the type of `axes`, float32 or bfloat16.

        Raises:
            ValueError: when the axes are too far from orthonormal for the bound to mean anything.
        """
        codes, dim = codewords.shape
        self.dim, self.dtype = dim, dtype
        self.turn = dtype if axes is None or dtype != torch.int8 else axes.dtype
        self.centre = codewords.double().mean(dim=0).float()
        self.axes = None if axes is None else axes.to(self.turn)
        self.rank = dim if axes is None else axes.shape[1]
        self.coordinates = torch.empty(codes, self.rank, dtype=dtype)
        # (4, P) float32: scales, |z|^2 / 2 from below, and the two lengths that queries multiply
        self.described = torch.ones(4, codes)
        # |b| + beta, beta and rho of docs/search-margins.md
        self._lengths = torch.empty(3, codes, dtype=torch.float64)
        self.coarse = 2.0**-20
        if dtype == torch.bfloat16:
            self.coarse += UNIT[dtype] / (1.0 - UNIT[dtype])
        self.largest = 0.0
        # a sum of int8 products is exact; its scaling and the loop's sums take nine at most
        self._roundings = 32 if dtype == torch.int8 else self.rank + 8
        self._frobenius, self._low, self._high = 1.0, 1.0, 1.0
        basis = None if self.axes is None else self._measure_axes(self.axes.double())
        for start in range(0, codes, _ROWS):
            self._describe(codewords, slice(start, start + _ROWS), basis)
        # any weight is right; this one makes the two products about as large as their sum
        share = self._lengths[1] / self._lengths[0].clamp_min(1e-300)
        self._weight = float(share.median()) + gamma(self._roundings)
        self._write(self._lengths)

    def follow(self, moved: Tensor, squares: Tensor) -> None:
        """Bound codewords that have moved since they were described, whose coordinates stay.

        `moved` (P,) float64: how far each is from where it was described, or more; `squares` (P,)
        float64: |z|^2 of each where it is now, by sums of d terms in float64.
        """
        inside = moved * (math.sqrt(self._high) / self._low)
        self._write(self._lengths + torch.stack([inside, inside, moved]))
        self.described[1] = (0.5 * squares / INFLATE).float()
        self.largest = math.sqrt(float(squares.max())) * (1.0 + 1e-9)

    def _write(self, lengths: Tensor) -> None:
        """Put the two lengths that queries multiply where the loop reads them."""
        columns = torch.stack([self._weight * lengths[0] + lengths[1], lengths[2]])
        self.described[2:] = (columns * INFLATE).float()

    def _measure_axes(self, axes: Tensor) -> _Basis:
        gram = axes.T @ axes
        excess = gram - torch.eye(self.rank, dtype=torch.float64)
        fourth = torch.linalg.matrix_power(excess, 4)
        # the spectral norm of a symmetric A is at most |A^4|_F^(1/4)
        spread = float(torch.linalg.matrix_norm(fourth)) ** 0.25 * (1.0 + 1e-9) + 1e-11
        if not spread < 0.5:
            raise ValueError(f"axes are not orthonormal: |W'W - I| may be {spread:.2g}")
        self._low, self._high = 1.0 - spread, 1.0 + spread  # squared singular values
        self._frobenius = float(axes.square().sum().sqrt()) * (1.0 + 1e-9)
        return _Basis(axes, excess, torch.linalg.inv(gram))

    def _describe(self, codewords: Tensor, piece: slice, basis: _Basis | None) -> None:
        z32 = codewords[piece] - self.centre
        z = z32.double()
        length = z.square().sum(dim=1).sqrt()
        self.largest = max(self.largest, float(length.max()) * (1.0 + 1e-9))
        if basis is None:
            coordinates = z32.to(self.dtype)
            b = coordinates.double()
            wrong = (z - b).square().sum(dim=1).sqrt()
            outside = torch.zeros_like(wrong)
        else:
            a = z @ basis.axes
            coordinates, b = self._rounded(a @ basis.inverse, piece)
            turned = b @ basis.excess  # (W'W - I) b
            inside = (a - b - turned).square().sum(dim=1).sqrt()  # W'(z - W b)
            rest = length.square() - (b * (2.0 * a - b - turned)).sum(dim=1)  # |z - W b|^2
            # of the float64 products above
            factor = (self.dim + self.rank + 32) * 2.0**-51 * (1.0 + self._frobenius) ** 2
            error = factor * (length + b.square().sum(dim=1).sqrt())
            inside = inside + error
            wrong = inside / self._low
            rest = rest + error * (length + b.square().sum(dim=1).sqrt())
            outside = rest - (inside - 2.0 * error).clamp_min(0).square() / self._high
            outside = outside.clamp_min(0).sqrt() * (1.0 + 1e-9)
        self.coordinates[piece] = coordinates
        known = b.square().sum(dim=1).sqrt()
        self.described[1, piece] = (0.5 * length.square() / INFLATE).float()
        self._lengths[:, piece] = torch.stack([known + wrong, wrong, outside])

    def _rounded(self, wanted: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        """Coordinates near `wanted` (n, r) float64 in the type of the bound, and their values."""
        if self.dtype != torch.int8:
            coordinates = wanted.to(self.dtype)
            return coordinates, coordinates.double()
        scales, numbers = nearest_int8(wanted)
        self.described[0, piece] = scales
        return numbers, numbers.double() * scales.double()[:, None]

    def query_terms(self, lengths: QueryLengths, scales: Tensor) -> QueryTerms:
        """What the loop needs of queries (m) whose lengths were measured; `scales` (m,) float32."""
        exact = (self.dim + 16) * 2.0**-53
        squares = lengths.centred
        length = (squares * (1.0 + exact)).sqrt()
        p, kept = ((part * (1.0 + exact)).sqrt() for part in (lengths.known, lengths.kept))
        rounded, dropped = (
            (part * (1.0 + exact)).sqrt() for part in (lengths.lost, lengths.dropped)
        )
        if self.axes is None:
            delta, outside = rounded, torch.zeros_like(p)
        else:
            unit = UNIT[self.turn] if self.turn == torch.bfloat16 else 0.0
            high = math.sqrt(self._high)
            delta = high * rounded + gamma(self.dim + 8) * self._frobenius * (length + rounded)
            delta += unit / (1.0 - unit) * p
            flushed = self.dim + math.sqrt(self.dim) * (length + rounded + high) + 1.0
            delta += _TINY * math.sqrt(self.rank) * flushed
            inside = (p - delta).clamp_min(0.0).square() / self._high
            outside = (squares * (1.0 + 4.0 * exact) - inside).clamp_min(0.0).sqrt()
        # a c + p b <= f (w c + b) for f = max(p, a / w): one product in place of two
        first = (delta + dropped + gamma(self._roundings) * kept) / self._weight
        first = torch.maximum(kept, first)
        coarse = torch.full_like(first, self.coarse)
        widened = [first * INFLATE, outside * INFLATE, scales.double(), coarse]
        reach = length + self.largest
        miss = 2.0**-24 * (1.0 + 1e-6) * reach + _TINY * math.sqrt(self.dim)
        slack = _TINY * (self.dim + 8.0 + math.sqrt(self.dim) * (kept + 2.0 * self.largest))
        limits = torch.stack([squares * (1.0 - exact), miss, slack, length], dim=1)
        usable = reach.square() < 2.0**120
        return QueryTerms(torch.stack(widened, dim=1).float(), limits, usable)


def nearest_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (n,) float32 and numbers (n, r) int8: their products are near `rows`, float64."""
    scales = (rows.abs().amax(dim=1) / LEVELS).float()
    scales[scales < LEAST_SCALE] = 0.0
    steps = rows / scales.double().clamp_min(LEAST_SCALE)[:, None]
    return scales, steps.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


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


def random_rotation(rank: int, seed: int = 0) -> Tensor:
    """Orthonormal (rank, rank) float32: turned by it, a vector has no coordinate that is large."""
    generator = torch.Generator().manual_seed(seed)
    turned: Tensor = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    return turned
