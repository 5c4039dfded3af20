"""Exact search on a GPU whose large product runs on tensor cores: float16 first, then float64.

Codewords and queries are centred, scaled by powers of two and rounded to float16. One product,
summed in float32, bounds every distance from below: what the rounding lost was measured, and what
the sums may have lost, in whatever order and with truncation, is proven (docs/search-margins.md).
Codewords whose bound is under the least upper bound of their query are its candidates. A query with
one candidate is done, one with a few is settled in float64, and what is left goes to the dense
search. The answers are those of every back end.

The host waits for the device once a call, for two numbers: how many pairs are to be settled, and
how many queries are left.
"""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.bound import gamma
from vqguard.search.dense import DenseSearch
from vqguard.search.precision import full_precision
from vqguard.search.settle import settle_pairs

_log = logging.getLogger("vqguard.search")

_SCORES = 2**24
"""Elements of a block of scores: 64 MB."""
_GROUP = 32
"""Codewords of which the scores' minimum is taken first: one pass over all in place of a sort."""
_GROUPS = 8
"""Groups a query that are looked into."""
_CANDIDATES = 16
"""More than these a query go to the dense search."""
_ALIGNED = 8
"""Tensor cores need rows of a multiple of 16 bytes."""
_ROWS = 1024
_NARROW = 64
"""Narrower codewords are searched by `torch`: the product is not what takes the time."""

_LEADING = 13
"""Exponent of a scaled row's largest number."""
_SMALLEST = 2.0**-14
"""Of the normal numbers of float16. What is smaller is dropped: hardware may do so."""
_SCALES = 60
"""Scales are 2^-60 to 2^60, so that the product of two is a normal number."""
_BEYOND = 2.0**60
"""A vector with numbers as large as this is left to the dense search."""
_INFLATE = 1.0 + 2.0**-20
"""Covers the float32 roundings by which a score is made from a product (at most 8 2^-24)."""
_MEASURED = 1.0 + 1e-9
"""Covers the roundings of a length in float64."""
_TINY = 2.0**-120
"""Covers products that underflow, relative to the small factors beside it."""


class _Halves(NamedTuple):
    """Rows v (n, d) float32, described by v' = scale * numbers; all lengths float64 (n,)."""

    numbers: Tensor
    """(n, w) float16, w a multiple of 8: zeros or normal numbers under 2^14."""
    scale: Tensor
    """(n,) float32, powers of two."""
    length: Tensor
    """|v|."""
    kept: Tensor
    """|v'|."""
    lost: Tensor
    """|v - v'|."""


def _halves(rows: Tensor, largest: Tensor) -> _Halves:
    """Round `rows` (n, d) float32, under 2^60, whose numbers are at most `largest` (n,) or (1,)."""
    # the exponents stand in the bits: no power function need be exact
    shift = ((largest.view(torch.int32) >> 23) - 127 - _LEADING).clamp(-_SCALES, _SCALES)
    scale, inverse = (((127 + sign * shift) << 23).view(torch.float32) for sign in (1, -1))
    scaled = rows * inverse[:, None]
    width = -(-rows.shape[1] // _ALIGNED) * _ALIGNED
    numbers = torch.zeros(rows.shape[0], width, dtype=torch.float16, device=rows.device)
    numbers[:, : rows.shape[1]] = scaled.where(scaled.abs() >= _SMALLEST, 0.0)
    exact = rows.double()
    rounded = numbers[:, : rows.shape[1]].double() * scale.double()[:, None]
    length, kept, lost = (
        part.square().sum(dim=1).sqrt() for part in (exact, rounded, exact - rounded)
    )
    return _Halves(numbers, scale.expand(rows.shape[0]), length, kept, lost)


def accumulation(terms: int) -> float:
    """Relative error of a sum of `terms` exact products on tensor cores, to sum |a b|.

    For any order, any number of addends at once, alignment to the largest with 24 bits, and
    truncation (docs/search-margins.md).
    """
    return gamma(3 * terms, 2.0**-23)


class TensorCoreSearch(CodewordSearch):
    """Two passes on CUDA; extra memory is bounded, whatever M is."""

    name = "tensor-cores"
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)
    remedy = "Choose search='torch', which runs on every device"

    _sound = False
    _tried: tuple[torch.device, torch.Size] | None = None

    @classmethod
    def problem(cls) -> str | None:
        """Why there is no float16 product with float32 sums here, or None."""
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        if torch.version.hip:
            return "the error of its sums was not bounded for AMD's matrix cores"
        if not hasattr(torch.ops.aten.mm, "dtype"):
            return f"torch {torch.__version__} rounds float16 products to float16; 2.8 does not"
        devices = range(torch.cuda.device_count())
        if min(torch.cuda.get_device_capability(device) for device in devices) < (7, 0):
            return "a visible GPU has no tensor cores (compute capability under 7.0)"
        return None

    @classmethod
    def candidates(
        cls, codewords: Tensor, queries: Tensor, dense_seconds: float
    ) -> list[CodewordSearch]:
        """None for narrow codewords, where the product is a small part of the time."""
        return [] if codewords.shape[1] < _NARROW else [cls(codewords)]

    def _prepare(self) -> None:
        codes, device = self.codewords.shape[0], self.codewords.device
        self._dense = DenseSearch(self.codewords)
        self._centre = self.codewords.double().mean(dim=0).float()
        pieces = [slice(start, start + _ROWS) for start in range(0, codes, _ROWS)]
        # one scale for all, so that a query's products have one
        tops = [self._centred(self.codewords[piece]).abs().amax() for piece in pieces]
        largest = torch.stack(tops).amax(dim=0, keepdim=True)
        described = [_halves(self._centred(self.codewords[piece]), largest) for piece in pieces]
        padded = -(-codes // _GROUP) * _GROUP
        width = described[0].numbers.shape[1]
        self._words = torch.zeros(padded, width, dtype=torch.float16, device=device)
        torch.cat([piece.numbers for piece in described], out=self._words[:codes])
        self._scale = described[0].scale[:1]
        length, kept, lost = (
            torch.cat([getattr(piece, name) for piece in described]) * _MEASURED
            for name in ("length", "kept", "lost")
        )
        self._largest = length.amax()
        self._roundings = accumulation(width) + 2.0**-20
        # any weight is right; this one makes the two products about as large as their sum
        share = (lost / kept.clamp_min(1e-300)).median().clamp(max=1.0)
        self._weight = share + self._roundings
        # of docs/search-margins.md: h, a lower end of |z|^2 / 2, and a
        self._half = torch.full((padded,), math.inf, device=device)
        self._half[:codes] = (0.5 * (length / _MEASURED).square() / _INFLATE).float()
        self._reach = torch.zeros(padded, device=device)
        self._reach[:codes] = ((self._weight * kept + lost) * _INFLATE).float()
        place = (device, self._words.shape)
        if place != self._tried:
            self._tried, self._sound = place, self._sums_in_float32()

    def _centred(self, rows: Tensor) -> Tensor:
        return (rows - self._centre).clamp(-_BEYOND, _BEYOND)

    def _sums_in_float32(self) -> bool:
        """Whether sums of whole numbers under 2^24, of the codewords' shape, are exact.

        That is what the bound on rounding rests on: 24 bits at every alignment. Sums in float16, or
        in the 14 bits of some float8 hardware, lose the ones beside 2^23.
        """
        width = self._words.shape[1]
        count = min(width // 2, 32)
        where = torch.linspace(0, width - 1, count).round().long()
        word = torch.ones(width)
        word[where] = 2.0**11
        rows = torch.ones(count, width)
        rows[:, where] = 2.0**12 * torch.eye(count)
        rows[1::2] = -rows[1::2]
        exact = (rows.double() @ word.double()).to(self._words.device)
        words = word.half().to(self._words.device).expand_as(self._words).contiguous()
        with full_precision(self._words.device):
            sums = self._product(rows.half().to(self._words.device), words)
        sound = sums.dtype == torch.float32 and bool((sums.double() == exact[:, None]).all())
        if not sound:
            _log.warning(
                "products of float16 numbers are not summed in float32 on %s; the dense search does"
                " the work of the back end %s",
                self._words.device,
                self.name,
            )
        return sound

    def _product(self, rows: Tensor, words: Tensor) -> Tensor:
        """Products (m, n) float32 of float16 rows (m, w) and (n, w), summed in float32."""
        multiply: Any = torch.mm
        return multiply(rows, words.T, out_dtype=torch.float32)  # type: ignore[no-any-return]

    def _accepted(self, queries: Tensor) -> Tensor:
        # a query that is not finite has no candidate: it is found where the rest is dealt with
        return queries.detach().to(torch.float32).contiguous()

    def _nearest(self, queries: Tensor) -> Tensor:
        if not self._sound:
            return self._dense(queries)
        codes, counts = self._near(queries)
        found = codes[:, 0].contiguous()
        several, left = counts > 1, counts == 0
        # the one time that the host waits for the device
        pairs, open_rows = torch.stack([counts.where(several, 0).sum(), left.sum()]).tolist()
        if pairs:
            ranks = torch.arange(_CANDIDATES, device=counts.device)
            listed = (ranks < counts[:, None]) & several[:, None]
            chosen = listed.flatten().int().argsort(descending=True)[:pairs]
            rows = chosen // _CANDIDATES
            settle_pairs(queries, self.codewords, rows, codes.flatten()[chosen], found)
        if open_rows:
            super()._accepted(queries)
            rows = left.nonzero().flatten()
            found[rows] = self._dense(queries[rows])
        return found

    def decided(self, queries: Tensor) -> tuple[int, int, int]:
        """Of float queries (M, d): how many have one candidate, a few, and go to the dense search.

        For measurements; a search does not depend on it.
        """
        _, counts = self._near(self._accepted(queries))
        one, left = int((counts == 1).sum()), int((counts == 0).sum())
        return one, len(queries) - one - left, left

    def _near(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(M, 16) codewords, those that may be nearest first, and their number (M,).

        The number is 0 where the bound does not decide. Nothing here waits for the device.
        """
        total, dim = queries.shape
        size = max(1, _SCORES // max(self._words.shape[0], 4 * dim))
        codes = torch.zeros(total, _CANDIDATES, dtype=torch.int64, device=queries.device)
        counts = torch.zeros(total, dtype=torch.int64, device=queries.device)
        with full_precision(queries.device):
            for start in range(0, total, size):
                piece = slice(start, start + size)
                self._bound(queries[piece], codes[piece], counts[piece])
        return codes, counts

    def _bound(self, queries: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Write the candidates of a block of queries into `codes`, their numbers in `counts`."""
        centred = self._centred(queries)
        halves = _halves(centred, centred.abs().amax(dim=1))
        length, kept, lost = (part * _MEASURED for part in halves[2:])
        both = length + self._largest
        usable = both.square() < 2.0**120
        # docs/search-margins.md: f
        factor = torch.maximum(length, (lost + self._roundings * kept) / self._weight) * _INFLATE
        factor = factor.where(usable, 0.0)
        scores = self._product(halves.numbers, self._words)
        scale = halves.scale * self._scale
        torch.addcmul(self._half, scores, -scale[:, None], out=scores)
        scores.addcmul_(self._reach, -factor.float()[:, None])

        groups, outside = self._least_groups(scores)
        near = (groups[:, :, None] * _GROUP + torch.arange(_GROUP, device=groups.device)).flatten(1)
        bounds = scores.gather(1, near).double()
        upper = bounds + 2.0 * factor[:, None] * self._reach[near] + 2.0**-18 * self._half[near]
        limit = self._limit(upper.amin(dim=1), length, factor, both)
        number = (bounds <= limit[:, None]).sum(dim=1)
        decided = usable & (number <= _CANDIDATES) & ~(outside <= limit)
        ranks = bounds.topk(min(_CANDIDATES, near.shape[1]), largest=False).indices
        codes[:, : ranks.shape[1]] = near.gather(1, ranks)
        counts.copy_(number.where(decided, 0))

    def _least_groups(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Groups (m, 8) with the least scores; the least score (m,) float64 outside of them."""
        minima = scores.view(scores.shape[0], -1, _GROUP).amin(dim=2)
        inside = min(_GROUPS, minima.shape[1])
        least, groups = minima.topk(min(inside + 1, minima.shape[1]), largest=False)
        if least.shape[1] > inside:
            return groups[:, :inside], least[:, inside].double()
        return groups, torch.full_like(least[:, 0], math.inf, dtype=torch.float64)

    def _limit(self, upper: Tensor, length: Tensor, factor: Tensor, both: Tensor) -> Tensor:
        """The score (m,) float64 above which no codeword is nearest.

        `upper` (m,): an upper end of |z|^2 / 2 - y.z for some codeword. `both` is |y| + max |z|.
        """
        dim = self.codewords.shape[1]
        squares = (length / _MEASURED).square()
        slack = _TINY * (1.0 + factor + self._reach.amax())
        # of the squares and sums in float64
        error = ((dim + 16) * 2.0**-53 + 2.0**-48) * both.square() + slack
        distance = (squares + 2.0 * (upper + error)).clamp_min(0.0).sqrt()
        miss = 2.0**-24 * (1.0 + 1e-6) * both + 2.0**-125 * math.sqrt(dim)
        reach = (distance + 2.0 * miss) * (1.0 + 2.0**-46)
        return 0.5 * (reach.square() - squares) + error
