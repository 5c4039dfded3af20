"""Which plans of the pruned search are worth timing, from a model of their cost.

The model of a token's time: rotation + product with the coordinates + reading every bound + second
bounds + distances. The rates of products are measured once a type and scale with the width; the
codewords that the first bound leaves are counted for a sample of tokens, by bounds without the
margins of rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.search.bound import LEVELS, UNIT, gamma, principal_axes
from vqguard.search.plan import MOST, Plan, has_bfloat16, multiplies_int8
from vqguard.search.precision import full_precision
from vqguard.search.second_bound import LOOK
from vqguard.search.timing import seconds

_FASTEST, _SLOWEST = 24.0, 96.0  # a distance alone, in distances of a matrix product
_MOST_AXES = 1024  # more take longer to prepare than they save
_READ = 4e-10  # seconds a bound
_FEW = 3.0  # distances after the second bounds
_RATE_ROWS, _RATE_COLUMNS, _RATE_WIDTH = 256, 2048, 512
_CLOSE = 1.25
"""Another type's plan is timed too where the model says at most this much more of it."""
_ABSURD = 1.0
"""No plan is timed of which the model says more than this share of the dense search."""
_SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)


class _Sample(NamedTuple):
    """Codewords z (P, d) and tokens y (m, d) around the mean, and what all ranks share."""

    z: Tensor
    y: Tensor
    zz: Tensor
    yy: Tensor
    products: Tensor
    along: tuple[Tensor, Tensor]
    """Coordinates of y and z along the trial axes."""


def plans_worth_timing(
    words: Tensor, tokens: Tensor, dense_time: float
) -> tuple[list[Plan], Tensor | None]:
    """The plans that should take the least time a token of `tokens` (m, d), best first.

    One of each type of coordinates at most, none where every plan is absurd. `dense_time`: seconds
    of the dense search, a token. With them the principal axes (d, r) of `words` that were tried, in
    order of variance, which serve every rank up to r; None where there are none.
    """
    codes, dim = words.shape
    distance = _distance_time(words, tokens)
    # what the budget of the slowest input rests on: a measurement that went wrong may not move it
    worth = max(1.0, codes / _SLOWEST, min(codes / _FASTEST, dense_time / distance))
    axes = principal_axes(words, min(dim - 1, _MOST_AXES)) if dim > 128 else None
    sample = _sample(words, tokens, axes)
    most = MOST * worth * distance
    best: list[tuple[float, Plan]] = []
    for dtype in _types(codes):
        pairs = _seconds_a_pair(dtype)
        turning = _seconds_a_pair(_turn(dtype))
        estimates = []
        for rank in _ranks(dim, dtype):
            rotated = rank < dim or dtype == torch.int8
            count = _survivors(sample, rank, dtype)
            each = distance * (LOOK * count + _FEW if rank < dim else 1.0 + count)
            # a token with too many candidates is left to the dense search
            each[each > most] = dense_time
            taken = codes * rank * pairs + codes * _READ + float(each.mean())
            taken += dim * rank * turning if rotated else 0.0
            estimates.append((taken, Plan(rank, str(dtype).removeprefix("torch."), worth)))
        best.append(min(estimates))
    best.sort()
    limit = min(_CLOSE * best[0][0], _ABSURD * dense_time)
    return [plan for taken, plan in best if taken <= limit], axes


def _types(codes: int) -> list[torch.dtype]:
    exact = [torch.int8] if multiplies_int8(_RATE_WIDTH, codes) else []
    return [*exact, torch.bfloat16 if has_bfloat16() else torch.float32]


def _turn(dtype: torch.dtype) -> torch.dtype:
    """The type in which queries are rotated."""
    return torch.bfloat16 if has_bfloat16() and dtype != torch.float32 else torch.float32


def _ranks(dim: int, dtype: torch.dtype) -> list[int]:
    parts = (int(dim * share) // 16 * 16 for share in _SHARES if dim > 128)
    ranks = {part for part in parts if 16 <= part <= min(dim - 1, _MOST_AXES)}
    # all of d: int8 then takes a random rotation (d, d), the others none
    whole = dtype != torch.int8 or dim <= 2 * _MOST_AXES
    return sorted(ranks | ({dim} if whole or not ranks else set()))


def _seconds_a_pair(dtype: torch.dtype) -> float:
    """Seconds that a product takes for one number of a token and one of a codeword."""
    a, b = torch.ones(_RATE_ROWS, _RATE_WIDTH), torch.ones(_RATE_COLUMNS, _RATE_WIDTH)
    left, right = a.to(dtype), b.to(dtype).T
    kind = torch.int32 if dtype == torch.int8 else dtype
    out = torch.empty(_RATE_ROWS, _RATE_COLUMNS, dtype=kind)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    with full_precision(a.device):
        taken = seconds(lambda: product(left, right, out=out))
    return taken / (_RATE_ROWS * _RATE_WIDTH * _RATE_COLUMNS)


def _distance_time(words: Tensor, tokens: Tensor) -> float:
    """Seconds of one compiled distance to a codeword that is not in the processor's cache."""
    from vqguard.search import kernels  # imports numba, which is optional

    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(words.shape[0], generator=generator)[:2000].numpy()
    x, e = tokens[0].numpy(), words.numpy()
    return seconds(lambda: kernels.distances(x, e, order)) / len(order)


def _sample(words: Tensor, tokens: Tensor, axes: Tensor | None) -> _Sample:
    centre = words.mean(dim=0)
    z, y = words - centre, tokens - centre
    with full_precision(words.device):
        products = y @ z.T
        along = (y, z) if axes is None else (y @ axes, z @ axes)
    return _Sample(z, y, z.square().sum(dim=1), y.square().sum(dim=1), products, along)


def _survivors(sample: _Sample, rank: int, dtype: torch.dtype) -> Tensor:
    """Number (m,) of codewords whose bound is under the least distance."""
    z, _, zz, yy, products, along = sample
    dim = z.shape[1]
    least = (zz - 2.0 * products).amin(dim=1)
    unit = UNIT.get(_turn(dtype), 0.0) if _turn(dtype) == torch.bfloat16 else 0.0
    if rank == dim:
        inner, slack = products, torch.zeros_like(products)
        inside = yy.sqrt()[:, None] * zz.sqrt()
        turned = 1.9 * unit + gamma(rank)
    else:
        a, b = along[0][:, :rank], along[1][:, :rank]
        aa, bb = a.square().sum(dim=1), b.square().sum(dim=1)
        with full_precision(z.device):
            inner = a @ b.T
        slack = (yy - aa).clamp_min(0).sqrt()[:, None] * (zz - bb).clamp_min(0).sqrt()
        inside = aa.sqrt()[:, None] * bb.sqrt()
        turned = 2.9 * unit + gamma(dim) * rank**0.5
    if dtype == torch.int8:
        # a step is the largest of r Gaussian numbers over 127; both sides are off by its root
        # mean square rounding, and a bfloat16 rotation by less than `turned`
        step = math.sqrt(2.0 * math.log(2.0 * rank)) / (LEVELS * math.sqrt(12.0))
        turned = 2.0 * step + 1.5 * unit
    bounds = zz - 2.0 * (inner + slack + turned * inside)
    return (bounds <= least[:, None]).sum(dim=1).double()
