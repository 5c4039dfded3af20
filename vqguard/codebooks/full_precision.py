"""Parameters that stay float32 whatever the model is cast to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FullPrecision(nn.Module):
    """Casting a model (`half`, `to(torch.bfloat16)`) moves this module and leaves its dtypes.

    Rounding what codes are found with would change codes and verdicts.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FullPrecision:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        apply: Any = super()._apply
        apply(move, recurse)
        return self
