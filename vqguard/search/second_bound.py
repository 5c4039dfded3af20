"""A second lower bound, for the codewords that the first one does not rule out.

Every centred codeword is kept once more, whole and unturned, in int8 with a scale of its own. The
query is not rounded, so that this bound misses half of what the first one misses, and nothing is
left out. It reads a quarter of the bytes of a distance, which is what a distance costs.
docs/search-margins.md derives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.search.bound import INFLATE, gamma, nearest_int8

LOOK = 0.2
"""What one evaluation costs, in distances."""
_ROWS = 1024


class SecondBound:
    """Codewords (P, d) float32 around `centre` (d,) in int8, and what rounding may have cost."""

    def __init__(self, codewords: Tensor, centre: Tensor, relative: float) -> None:
        """`relative`: error of a compiled sum of products of width d (see `sum_error`)."""
        codes, dim = codewords.shape
        self.numbers = torch.empty(codes, dim, dtype=torch.int8)
        # (2, P) float32: scales, and the lengths that |y| multiplies
        self.described = torch.empty(2, codes)
        self._missed = torch.empty(codes, dtype=torch.float64)
        for start in range(0, codes, _ROWS):
            piece = slice(start, start + _ROWS)
            z = (codewords[piece] - centre).double()
            scales, numbers = nearest_int8(z)
            kept = numbers.double().mul_(scales.double()[:, None])
            dropped = (z - kept).square_().sum(dim=1).sqrt()
            self._missed[piece] = dropped + relative * kept.square_().sum(dim=1).sqrt()
            self.numbers[piece] = numbers
            self.described[0, piece] = scales
        self.described[1] = (self._missed * INFLATE).float()

    def follow(self, moved: Tensor) -> None:
        """Bound codewords that are up to `moved` (P,) float64 from where they were described."""
        if self.numbers.shape[0]:
            self.described[1] = ((self._missed + moved) * INFLATE).float()


def sum_error(dim: int, chunk: int) -> float:
    """Relative error of a sum of `dim` products or squares, `chunk` of them in float32 at a time.

    Relative to the sum of what the terms are in size. The chunks are added in float64.
    """
    return gamma(min(dim, chunk) + 16) * (1.0 + 1e-4)
