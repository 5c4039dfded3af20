"""How many bytes a code takes on disk. Without what reads them: a plan asks as well."""

from __future__ import annotations

import torch


def code_dtype(size: int) -> torch.dtype:
    """The smallest dtype that holds codes in [0, size)."""
    if size <= 2**8:
        return torch.uint8
    return torch.uint16 if size <= 2**16 else torch.int32


def code_bytes(size: int) -> int:
    """Bytes of a code in [0, size)."""
    return code_dtype(size).itemsize
