"""The search on any device with torch alone: blocked matrix products, near-ties in float64.

Three steps, each for the queries that the one before could not decide: float32 products with a
proven margin, float64 products with a far smaller one over the distinct codewords, and the exact
comparison of whatever is still tied. A batch of equal inputs, a codebook of equal entries or a
query of norm 1e30 therefore costs time, never memory or a wrong answer.
"""

from __future__ import annotations

import hashlib
import math
import platform
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.precision import full_precision
from vqguard.search.settle import margin, overflows, settle, squared_norms

_ROWS = 1024
_BLOCK_ELEMENTS = {torch.float32: 2**21, torch.float64: 2**20}  # 8 MB of scores
_CODEWORD_ELEMENTS = 2**21  # float64 copies of codewords: 16 MB at a time
_LIMIT = 32  # candidates a query may have before it goes to the next step


class DenseSearch(CodewordSearch):
    """Exact search by blocked products. Extra memory is bounded, whatever M and P are."""

    name = "torch"
    follows = True

    def _prepare(self) -> None:
        self._norms = squared_norms(self.codewords)
        self._largest = math.sqrt(float(self._norms.max()))
        self._distinct: Tensor | None = None

    def _nearest(self, queries: Tensor) -> Tensor:
        nearest = torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)
        with full_precision(queries.device):
            for start in range(0, queries.shape[0], _ROWS):
                piece = slice(start, start + _ROWS)
                self._search_chunk(queries[piece], nearest[piece])
        return nearest

    def _search_chunk(self, queries: Tensor, into: Tensor) -> None:
        lengths = squared_norms(queries).sqrt_()
        crowded = overflows(lengths, self._largest)
        safe = (~crowded).nonzero().flatten()
        if safe.numel():
            every = safe.numel() == queries.shape[0]
            rows, columns, left = self._candidates(
                queries if every else queries[safe],
                lengths if every else lengths[safe],
                None,
                torch.float32,
            )
            settle(queries, self.codewords, safe[rows], columns, into)
            crowded[safe[left]] = True
        hard = crowded.nonzero().flatten()
        if hard.numel():
            self._search_hard(queries, lengths, hard, into)

    def _search_hard(self, queries: Tensor, lengths: Tensor, hard: Tensor, into: Tensor) -> None:
        distinct = self.distinct()
        rows, columns, left = self._candidates(
            queries[hard], lengths[hard], distinct, torch.float64
        )
        settle(queries, self.codewords, hard[rows], distinct[columns], into)
        for row in hard[left]:  # one query at a time: it may be tied with every codeword
            settle(queries, self.codewords, row.expand(distinct.shape[0]), distinct, into)

    def distinct(self) -> Tensor:
        """First index of every distinct codeword, ascending: a repeated one can never win."""
        if self._distinct is None:
            seen: set[bytes] = set()
            keep = []
            for index, row in enumerate(self.codewords.cpu().numpy()):
                digest = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    keep.append(index)
            self._distinct = torch.tensor(keep, device=self.codewords.device)
        return self._distinct

    def _candidates(
        self, queries: Tensor, lengths: Tensor, subset: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (rows, columns) that may be nearest, and the rows that have too many of them.

        `subset` limits the codewords; columns are then positions in it.
        """
        total, dim = self.codewords.shape
        total = total if subset is None else subset.shape[0]
        size = max(1, _BLOCK_ELEMENTS[dtype] // queries.shape[0])
        if dtype == torch.float64:
            size = max(1, min(size, _CODEWORD_ELEMENTS // dim))
            queries = queries.double()
        # a codeword whose score minus its margin exceeds some score plus its margin is not nearest
        bound = torch.full_like(lengths, math.inf)
        count = torch.zeros_like(lengths, dtype=torch.int64)
        pieces: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, total, size):
            chosen: slice | Tensor = slice(start, min(start + size, total))
            if subset is not None:
                chosen = subset[chosen]
            norms = self._norms[chosen]
            error = margin(lengths, math.sqrt(float(norms.max())), dim, dtype)
            block = self.codewords[chosen].to(dtype)
            scores = _scores(norms.to(dtype), queries, block)
            bound = torch.minimum(bound, scores.amin(dim=1).double() + error)
            rows, columns = (scores <= (bound + error).to(dtype)[:, None]).nonzero(as_tuple=True)
            count += torch.bincount(rows, minlength=queries.shape[0])
            few = count[rows] <= _LIMIT
            rows, columns = rows[few], columns[few]
            lower = scores[rows, columns].double() - error[rows]
            pieces.append((rows, columns + start, lower))
        rows = torch.cat([piece[0] for piece in pieces])
        columns = torch.cat([piece[1] for piece in pieces])
        lower = torch.cat([piece[2] for piece in pieces])
        keep = (lower <= bound[rows]) & (count <= _LIMIT)[rows]
        return rows[keep], columns[keep], (count > _LIMIT).nonzero().flatten()


def _scores(norms: Tensor, queries: Tensor, codewords: Tensor) -> Tensor:
    """|e|^2 - 2 x.e (m, n) in the dtype of all three, from |e|^2 (n,)."""
    if queries.device.type == "cpu" and queries.dtype == torch.float32 and _has_onednn():
        half: Tensor = _onednn_linear()(queries, codewords, norms.mul(-0.5), "none", [], "")
        return half.mul_(-2.0)  # a power of two: nothing is rounded
    return torch.addmm(norms, queries, codewords.T, alpha=-2.0)


def _has_onednn() -> bool:
    """Whether float32 products go to oneDNN: on x86, where torch's own take MKL.

    Of MKL's kernels an AMD processor gets those for AVX2: oneDNN's take 0.6 to 0.85 of their time.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return _onednn_linear() is not None


@lru_cache(maxsize=1)
def _onednn_linear() -> Any:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
