"""Near-ties: the error margin of a matrix product, and the float64 distances that decide.

The scores s_j = |e_j|^2 - 2 x.e_j order the codewords as the distances do. A matrix product returns
them with rounding errors that depend on the shape of the batch, so its smallest score proves
nothing when others are close. Every codeword that could be the nearest within the error is compared
by `distances`, whose result depends on the two vectors alone.

The margin. Let u be the unit roundoff, d the width, gamma_n = n u / (1 - n u). Each of the d terms
2 x_i e_i of a score, and |e|^2, passes through at most d + 1 roundings, whatever the order of the
sum, blocked or with fused multiply-add (Higham, Accuracy and Stability of Numerical Algorithms,
2nd ed., section 3.1). So |computed - exact| <= gamma_{d+1} (2 sum |x_i e_i| + |e|^2)
<= gamma_{d+1} (2 |x| |e| + |e|^2) by Cauchy-Schwarz. 31 more roundings are allowed for: those of
|e|^2 itself (a binary tree, at most 21), its cast, the norms, and the thresholds below. Products
that underflow, flushed to zero or not, add at most 2^-126 (2 d + 2 sum |x_i| + 2 sum |e_i|).
The float64 distances that decide have a rounding of their own, 24 2^-53 (|x| + |e|)^2 at most, and
of two codewords the farther one may come out nearer by it. For a query far away it is the larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}
_SETTLE_ELEMENTS = 2**20  # 8 MB of float64 differences at a time


def tree_sum(values: Tensor) -> Tensor:
    """Sum float64 (..., n) along the last axis in the order of one fixed binary tree. In place.

    Each step is an elementwise addition, which IEEE 754 defines to the bit: the sum of a row is the
    same alone and in a batch, on any device, thread count and vector width. `Tensor.sum` is not.
    """
    n = values.shape[-1]
    while n > 1:
        half = 1 << ((n - 1).bit_length() - 1)  # largest power of two below n
        values[..., : n - half] += values[..., half:n]
        n = half
    return values[..., 0]


def squared_norms(vectors: Tensor) -> Tensor:
    """Squared lengths of float32 vectors (M, d) as float64 (M,), by `tree_sum`."""
    out = torch.empty(vectors.shape[0], dtype=torch.float64, device=vectors.device)
    step = max(1, _SETTLE_ELEMENTS // vectors.shape[1])
    for start in range(0, vectors.shape[0], step):
        block = vectors[start : start + step].double()
        out[start : start + step] = tree_sum(block.mul_(block))
    return out


def distances(queries: Tensor, codewords: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of pairs: float64 (n,) of queries[rows] to codewords[columns].

    `queries` (M, d) and `codewords` (P, d) float32, `rows` and `columns` (n,) int64. The value of a
    pair is tree_sum((x - e)^2) in float64 and depends on nothing but x and e. It cannot overflow.
    """
    out = torch.empty(rows.shape[0], dtype=torch.float64, device=queries.device)
    # a GPU starts some twenty operations for a step, and has the memory for long ones
    elements = _SETTLE_ELEMENTS * (4 if queries.is_cuda else 1)
    step = max(1, elements // queries.shape[1])
    for start in range(0, rows.shape[0], step):
        piece = slice(start, start + step)
        difference = queries[rows[piece]].double()
        difference -= codewords[columns[piece]]
        out[piece] = tree_sum(difference.mul_(difference))
    return out


def settle(queries: Tensor, codewords: Tensor, rows: Tensor, columns: Tensor, into: Tensor) -> None:
    """Write into `into` (M,) int64 the nearest of the candidate pairs of each row present.

    Pairs as in `distances`. Equal distances go to the lowest column.
    """
    alone = torch.bincount(rows, minlength=queries.shape[0])[rows] == 1
    into[rows[alone]] = columns[alone]
    rows, columns = rows[~alone], columns[~alone]
    if rows.numel():
        settle_pairs(queries, codewords, rows, columns, into)


def settle_pairs(
    queries: Tensor, codewords: Tensor, rows: Tensor, columns: Tensor, into: Tensor
) -> None:
    """As `settle`, with the distance of every pair; the host waits for no result."""
    distance = distances(queries, codewords, rows, columns)
    best = torch.full((queries.shape[0],), math.inf, dtype=torch.float64, device=queries.device)
    best.scatter_reduce_(0, rows, distance, "amin")
    nobody = codewords.shape[0]
    into.index_fill_(0, rows, nobody)
    into.scatter_reduce_(0, rows, columns.where(distance == best[rows], nobody), "amin")


def margin(query_norms: Tensor, codeword_norm: float, dim: int, dtype: torch.dtype) -> Tensor:
    """Bound (M,) float64 on the error of scores |e|^2 - 2 x.e computed in `dtype`.

    With what `distances` may be off by: two scores that are twice this apart are decided.

    `query_norms` (M,) float64 lengths |x|, `codeword_norm` the largest |e| among the codewords.
    """
    terms = dim + 32
    gamma = terms * _UNIT[dtype] / (1.0 - terms * _UNIT[dtype])
    largest = codeword_norm * (2.0 * query_norms + codeword_norm)
    # sum |x_i| <= sqrt(d) |x|
    lost = 2.0 * dim + 2.0 * math.sqrt(dim) * (query_norms + codeword_norm)
    decided = 2.0**-48 * (query_norms + codeword_norm).square()
    return gamma * largest + decided + _TINY[dtype] * lost


def overflows(query_norms: Tensor, codeword_norm: float) -> Tensor:
    """Mask (M,) of queries whose float32 scores could overflow."""
    return codeword_norm * (2.0 * query_norms + codeword_norm) >= 2.0**126
