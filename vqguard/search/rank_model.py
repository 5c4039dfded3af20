"""Which ranks of the pruned search's bound are worth timing, from a model of its cost."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.search.bound import UNIT, gamma, principal_axes
from vqguard.search.plan import MOST, Plan, has_bfloat16
from vqguard.search.precision import full_precision
from vqguard.search.timing import seconds

_FASTEST, _SLOWEST = 12.0, 64.0  # a distance alone, in distances of a matrix product
_AXES_FROM = 1536  # rows that the trial axes are taken from


def plans_worth_timing(words: Tensor, sample: Tensor, dense_time: float) -> list[Plan]:
    """The rank that should take the least time a token of `sample` (64, d), and all of d.

    The model: product with the coordinates + rotation + one look at every bound + distances, the
    products measured, the distances counted for the sample. The search without a rotation depends
    on the features least, so both are to be timed. `dense_time`: seconds of the dense search for a
    token.
    """
    codes, dim = words.shape
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    one = _distance_time(words, sample)
    # what the budget of the slowest input rests on: a measurement that went wrong may not move it
    worth = max(1.0, codes / _SLOWEST, min(codes / _FASTEST, dense_time / one))
    fractions = (0.0625, 0.125, 0.1875, 0.25)
    ranks = sorted({max(16, int(dim * part) // 16 * 16) for part in fractions if dim > 128})
    axes = _trial_axes(words, ranks[-1]) if ranks else None
    counts = _survivors(words, sample, axes, [*ranks, dim], dtype)
    best = (float("inf"), dim)
    rows = sample.to(dtype).repeat(4, 1)
    most = MOST * worth * one
    for rank, count in zip([*ranks, dim], counts, strict=True):
        narrow = words[:, :rank].to(dtype)
        part = rows[:, :rank].contiguous()
        taken = seconds(lambda a=part, b=narrow: a @ b.T)  # type: ignore[misc]
        if rank < dim:
            turn = torch.zeros(dim, rank, dtype=dtype)
            taken += seconds(lambda w=turn: rows @ w)  # type: ignore[misc]
        # a token with too many candidates is left to the dense search
        each = torch.where(one * count < most, one * (1.0 + count), dense_time)
        taken = taken / len(rows) + float(each.mean()) + codes * 3e-10
        best = min(best, (taken, rank))
    name = str(dtype).removeprefix("torch.")
    return [Plan(rank, name, worth) for rank in sorted({best[1], dim})]


def _trial_axes(words: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(words.shape[0], generator=generator)[: max(rank, _AXES_FROM)]
    return principal_axes(words[rows], rank)


def _distance_time(words: Tensor, sample: Tensor) -> float:
    """Seconds of one compiled distance to a codeword that is not in the processor's cache."""
    from vqguard.search import kernels  # imports numba, which is optional

    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(words.shape[0], generator=generator)[:2000].numpy()
    x, e = sample[0].numpy(), words.numpy()
    return seconds(lambda: kernels.distances(x, e, order)) / len(order)


def _survivors(
    words: Tensor, sample: Tensor, axes: Tensor | None, ranks: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """Number (64,) of codewords whose bound is under the least distance, for each rank."""
    centre = words.mean(dim=0)
    z, y = words - centre, sample - centre
    zz, yy = z.square().sum(dim=1), y.square().sum(dim=1)
    with full_precision(words.device):
        products = y @ z.T
        coordinates = (y, z) if axes is None else (y @ axes, z @ axes)
    least = (zz - 2.0 * products).amin(dim=1)
    lengths = yy.sqrt()[:, None] * zz.sqrt()
    unit = UNIT[dtype] if dtype == torch.bfloat16 else 0.0
    found = []
    for rank in ranks:
        if rank == z.shape[1]:
            inner, slack = products, lengths * (1.9 * unit + gamma(rank))
        else:
            a, b = coordinates[0][:, :rank], coordinates[1][:, :rank]
            rest_y = (yy - a.square().sum(dim=1)).clamp_min(0).sqrt()
            rest_z = (zz - b.square().sum(dim=1)).clamp_min(0).sqrt()
            inner = a @ b.T
            slack = lengths * (2.9 * unit + gamma(z.shape[1]) * rank**0.5)
            slack += rest_y[:, None] * rest_z
        bounds = zz - 2.0 * (inner + slack)
        found.append((bounds <= least[:, None]).sum(dim=1).double())
    return found
