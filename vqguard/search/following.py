"""How far codewords have moved since a bound described them.

A codebook that is trained moves a little at every step. Describing it anew costs as much as
searching thousands of tokens; to look how far each codeword has come costs as much as twenty. What
it has moved is one more thing that its coordinates leave out: docs/search-margins.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1024
_STRAYED = 0.01
"""Of a codeword's length: about what rounding to int8 costs."""
_STRAYS = 0.01
"""Share of the codewords that may have strayed before all are described anew."""
_TURNED = 0.25
"""Of a codeword's length: axes that were principal no longer are."""


class Moves(NamedTuple):
    """Of P codewords around a centre, all float64."""

    lengths: Tensor
    """(P,) distance from where each was described, or a little more."""
    squares: Tensor
    """(P,) |z|^2 where each is now."""

    @property
    def strayed(self) -> bool:
        """Whether a bound of them would rule out too little."""
        near = self.lengths <= _STRAYED * self._typical  # false for NaN
        return int((~near).sum()) > _STRAYS * len(near)

    @property
    def turned(self) -> bool:
        """Whether other axes should be looked for."""
        return not float(self.lengths.median()) <= _TURNED * float(self._typical)

    @property
    def _typical(self) -> Tensor:
        return self.squares.median().sqrt()


def moves(described: Tensor, codewords: Tensor, centre: Tensor) -> Moves:
    """Of `codewords` (P, d) float32 from where they were `described`, both around `centre` (d,)."""
    lengths, squares = (torch.empty(len(codewords), dtype=torch.float64) for _ in range(2))
    for start in range(0, len(codewords), _ROWS):
        piece = slice(start, start + _ROWS)
        # the bound is of these differences, rounded to float32 as the queries' are
        z = (codewords[piece] - centre).double()
        squares[piece] = z.square().sum(dim=1)
        z -= (described[piece] - centre).double()
        lengths[piece] = z.square_().sum(dim=1).sqrt_()
    return Moves(lengths.mul_(1.0 + 1e-9), squares)
