"""The tensor-core search on the CPU, with products as GPUs of several kinds may round them."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.search.tensor_cores import TensorCoreSearch, accumulation


class Emulated(TensorCoreSearch):
    """Products in IEEE float32, in the order of the CPU's library."""

    devices = ("cuda", "cpu")

    @classmethod
    def problem(cls) -> str | None:
        return None

    def _product(self, rows: Tensor, words: Tensor) -> Tensor:
        return rows.float() @ words.float().T


def power_below(values: Tensor) -> Tensor:
    """The largest power of two up to |value| (float64), zero for zero."""
    return (values.view(torch.int64) & (0x7FF << 52)).view(torch.float64)


def truncated(values: Tensor, power: Tensor, bits: int) -> Tensor:
    """float64 `values` cut towards zero to multiples of `power` / 2^(bits - 1)."""
    grid = (power * 2.0 ** (1 - bits)).clamp_min(2.0**-900)
    return (values / grid).trunc() * grid


class Aligned(Emulated):
    """Blocks of `terms` products and the sum so far, aligned to the largest, cut to `bits` bits.

    Fasi, Higham, Mikaitis and Pranesh (PeerJ Computer Science 7, e330) found this on V100 (4 terms,
    24 bits), T4 and A100 (8 terms, with further bits). Products come in an order of their own,
    and in several sums that are added at the end.
    """

    terms = 8
    bits = 24
    parts = 2

    def _product(self, rows: Tensor, words: Tensor) -> Tensor:
        a, b = rows.double().T.contiguous(), words.double().T.contiguous()
        order = torch.randperm(a.shape[0], generator=torch.Generator().manual_seed(a.shape[0]))
        total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        for part in order.tensor_split(self.parts):
            sums = torch.zeros_like(total)
            for block in part.split(self.terms):
                products = [a[k][:, None] * b[k] for k in block.tolist()]  # exact in float64
                largest = sums.abs()
                for product in products:
                    torch.maximum(largest, product.abs(), out=largest)
                power = power_below(largest)
                sums = truncated(sums, power, self.bits)
                for product in products:
                    sums += truncated(product, power, self.bits)
                sums = truncated(sums, power_below(sums), 24)
            total = total + sums
            total = truncated(total, power_below(total), 24)
        return total.float()


class OneByOne(Aligned):
    """Each product added alone, and every sum truncated."""

    terms = 1
    parts = 1


class Worst(Emulated):
    """All that the proven bound admits, against the nearest codeword and for all others."""

    share = 0.999

    def _sums_in_float32(self) -> bool:
        return True  # whole numbers are summed wrongly too

    def _bound(self, queries: Tensor, codes: Tensor, counts: Tensor) -> None:
        self._nearest_ones = self._dense(queries)
        super()._bound(queries, codes, counts)

    def _product(self, rows: Tensor, words: Tensor) -> Tensor:
        a, b = rows.double(), words.double()
        allowed = self.share * accumulation(a.shape[1]) * (a.abs() @ b.abs().T)
        sign = torch.ones_like(allowed).scatter_(1, self._nearest_ones[:, None], -1.0)
        return (a @ b.T + sign * allowed).float()


class Float16Sums(Aligned):
    """What must not be used: sums that keep as few bits as float16 does."""

    bits = 11
