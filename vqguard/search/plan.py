"""How the pruned search computes its bound: a plan decides speed, never an answer."""

from __future__ import annotations

import os
from typing import Annotated, NamedTuple

import torch
from pydantic import Field

MOST = 0.3
"""A token may take distances worth this share of a dense search for it."""
_MULTIPLY_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
"""In the names of the instruction sets that `ONEDNN_MAX_CPU_ISA` may allow."""


class Plan(NamedTuple):
    """How the bound is computed: decides speed, never an answer."""

    rank: Annotated[int, Field(ge=1)]
    """Coordinates r of the bound, 1 to d; d means no rotation."""
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|int8)$")]
    """Type of the coordinates: "float32", "bfloat16" or "int8"."""
    worth: Annotated[float, Field(ge=1.0, le=1e9)]
    """Distances that take as long as the dense search of one token."""


def default_plan(codes: int, dim: int) -> Plan:
    """A plan without measurement, for P = `codes` and d = `dim`.

    A distance alone takes about as long as 24 in a matrix product.
    Where int8 products are cheap, 3/8 of the axes are worth it, of wide features half that.
    """
    worth = max(8.0, codes / 24.0)
    if has_int8():
        return Plan(dim if dim <= 128 else 3 * dim // (8 if dim <= 2048 else 16), "int8", worth)
    rank = dim if dim <= 128 else max(64, min(768, dim // 4))
    return Plan(rank, "bfloat16" if has_bfloat16() else "float32", worth)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself, with sums in float32."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if allowed and not any(kind in allowed for kind in _MULTIPLY_BFLOAT16):
        return False
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)


def has_int8() -> bool:
    """Whether the processor sums products of int8 in int32 itself (VNNI, AMX), through torch."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    names = ("_is_amx_tile_supported", "_is_vnni_supported")
    known = any(bool(getattr(torch.cpu, name, lambda: False)()) for name in names)
    return known and hasattr(torch, "_int_mm")


def multiplies_int8(rank: int, columns: int) -> bool:
    """Whether int8 products of this shape are exact here.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which saturates: 127 x 127 twice shows
    it. `ONEDNN_MAX_CPU_ISA` makes it so on any processor.
    """
    if not has_int8():
        return False
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(rank)[:rank]
    rows = torch.stack([torch.full((rank,), 127, dtype=torch.int8), 127 * signs] * 8)
    words = torch.stack([rows[0], -rows[0], rows[1]]).repeat(-(-columns // 3), 1)[:columns]
    exact = rows.double() @ words.double().T
    try:
        return torch.equal(torch._int_mm(rows, words.T).double(), exact)
    except RuntimeError:
        return False
