"""The patch level of a judge alone: features pass as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.codebooks.guard_output import PADDING
from vqguard.codebooks.quantizer import Quantized, VectorQuantizer
from vqguard.errors import InputError, NonFiniteError


class Unquantised(VectorQuantizer):
    """Gives features back with their gradient, and no code (-1) for each; nothing is learnt.

    Its one entry, zero, is the fixed vector that stands in the place of a refused picture's tokens.
    """

    def __init__(self, dim: int) -> None:
        """For features of width `dim`."""
        super().__init__(1, dim, search="torch")
        with torch.no_grad():
            self.codebook.weight.zero_()
        self.requires_grad_(False)

    @property
    def learning(self) -> bool:
        """Never: there are no entries to learn."""
        return False

    def encode(self, x: Tensor) -> Tensor:
        """-1 (...,) int64, no code, for each of the features (..., d).

        Raises:
            InputError: for another width.
            NonFiniteError: for NaN or infinity.
        """
        if x.dim() < 1 or x.shape[-1] != self.codebook.dim:
            raise InputError(
                f"features have shape {tuple(x.shape)}, the guard is for width {self.codebook.dim};"
                " take them at the site that it was built for"
            )
        if not bool(torch.isfinite(x).all()):
            raise NonFiniteError("visual tokens hold NaN or infinity; refuse this image")
        return torch.full(x.shape[:-1], PADDING, dtype=torch.int64, device=x.device)

    def forward(self, x: Tensor) -> Quantized:
        """The features themselves, without losses. Raises as `encode` does."""
        return Quantized(x, self.encode(x), None, None)

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features themselves, whatever estimator is in force. Raises as `encode` does."""
        return x, self.encode(x)
