"""Exact search that computes few distances: a lower bound on all of them first.

A narrow matrix product (`bound.CodewordBound`) bounds every distance from below. A compiled loop
takes, for each token, the true distance of the smallest bound, and then only of codewords whose
bound is under the best so far, in ascending order. What is still tied within the rounding of
float32 is settled in float64, as in every other back end.

Where the bound does not decide, the dense search does, and the detour is paid from a budget: all
distances together may cost `_EARNED` of what the dense search would have cost for the tokens that
are done, plus `_WASTE` of the whole batch. The slowest input is therefore a little slower than the
dense search.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.bound import (
    CodewordBound,
    QueryLengths,
    QueryTerms,
    principal_axes,
    random_rotation,
)
from vqguard.search.dense import DenseSearch
from vqguard.search.following import moves
from vqguard.search.plan import MOST, Plan, default_plan, has_bfloat16, multiplies_int8
from vqguard.search.precision import full_precision
from vqguard.search.rank_model import plans_worth_timing
from vqguard.search.second_bound import LOOK, SecondBound, sum_error
from vqguard.search.settle import settle
from vqguard.search.workers import Share, shared_rows

_PRODUCT_BYTES = 9 * 2**20
"""Of a panel's products. Smaller panels cost more than they save: threads meet after each."""
_ROWS = 576
_WASTE = 0.03
_EARNED = 0.6
"""Share of its dense search that a token done may have taken: the bound has a price of its own."""
_HOPELESS = 0.8
"""Share of the tokens left to the dense search from which the rest of the batch follows at once."""
_FIRST = 1 / 16
"""Share of the codewords in the first panel."""
_LEAST_ROWS = 16
"""Fewer tokens are padded: a product with one row would take another path through torch."""


class PrunedSearch(CodewordSearch):
    """Bound, then few distances; CPU only. Extra memory is bounded, whatever M is."""

    name = "pruned"
    devices = ("cpu",)
    follows = True
    remedy = "pip install 'vqguard[cpu]', or choose search='torch'"

    plan: Plan

    def __init__(
        self, codewords: Tensor, plan: Plan | None = None, axes: Tensor | None = None
    ) -> None:
        """`axes` (d, r): principal axes of `codewords` that are known, as many as planned or more.

        Raises as the base class does.
        """
        self._known_axes = axes
        self._bounds: tuple[CodewordBound, SecondBound] | None = None
        self._described: Tensor | None = None
        """A copy of codewords that are refreshed, as the bound describes them."""
        super().__init__(codewords, plan)
        self._known_axes = None  # of these codewords alone, and their memory is not needed

    @classmethod
    def problem(cls) -> str | None:
        """Whether numba is missing."""
        return "numba is not installed" if importlib.util.find_spec("numba") is None else None

    @classmethod
    def candidates(
        cls, codewords: Tensor, queries: Tensor, dense_seconds: float
    ) -> list[CodewordSearch]:
        """With the plans that a model of the cost names; none where every plan is absurd.

        And with the plan without measurement: where few axes seem to be enough, the model's counts
        are least to be relied on, and each codeword that it did not count is one more to look at.
        """
        plans, axes = plans_worth_timing(codewords, queries, dense_seconds)
        usual = default_plan(*codewords.shape)
        alike = any((plan.rank, plan.dtype) == (usual.rank, usual.dtype) for plan in plans)
        if plans and not alike and axes is not None and usual.rank <= axes.shape[1]:
            plans = [*plans, usual._replace(worth=plans[0].worth)]
        return [cls(codewords, plan, axes) for plan in plans]

    @cached_property
    def _kernels(self) -> Any:
        # keeps numba, an optional package, out of start-up
        return importlib.import_module("vqguard.search.kernels")

    @cached_property
    def _loops(self) -> Any:
        # imports numba
        return importlib.import_module("vqguard.search.refine")

    def _prepare(self) -> None:
        self._dense = DenseSearch(self.codewords)
        if self._bounds is None:
            self._describe(*self._planned(self._known_axes))
        elif self._described is None or self._described.shape != self.codewords.shape:
            self._describe(*self._planned())
            self._described = self.codewords.clone()
        else:
            self._follow(self._bound, self._described)

    def _planned(self, known: Tensor | None = None) -> tuple[Tensor | None, torch.dtype]:
        """Axes and type of the coordinates that the plan asks for."""
        codes, dim = self.codewords.shape
        plan = self.wanted or default_plan(codes, dim)
        rank = min(plan.rank, dim)
        dtype = _product_type(plan.dtype, rank, dim, codes)
        self.plan = Plan(rank, str(dtype).removeprefix("torch."), plan.worth)
        return self._axes(known, rank, dtype), dtype

    def _describe(self, axes: Tensor | None, dtype: torch.dtype) -> None:
        """Bound the codewords where they are now."""
        first = CodewordBound(self.codewords, axes, dtype)
        # where no axis is left out, the first bound is as good
        words = self.codewords if first.rank < first.dim else self.codewords[:0]
        self._bounds = first, SecondBound(words, first.centre, self._relative)

    def _follow(self, bound: CodewordBound, described: Tensor) -> None:
        """Stay with the bounds of codewords that have moved a little."""
        moved = moves(described, self.codewords, bound.centre)
        if moved.strayed:
            self._describe(*(self._planned() if moved.turned else (bound.axes, bound.dtype)))
            described.copy_(self.codewords)
        else:
            bound.follow(*moved)
            self._second.follow(moved.lengths)

    @property
    def _bound(self) -> CodewordBound:
        assert self._bounds is not None
        return self._bounds[0]

    @property
    def _second(self) -> SecondBound:
        assert self._bounds is not None
        return self._bounds[1]

    def _axes(self, known: Tensor | None, rank: int, dtype: torch.dtype) -> Tensor | None:
        dim = self.codewords.shape[1]
        axes = None
        if rank < dim:
            axes = principal_axes(self.codewords, rank) if known is None else known[:, :rank]
            axes = axes.contiguous()
        if dtype == torch.int8:
            turned = random_rotation(rank)
            axes = turned if axes is None else axes @ turned
            if _sums_in_float32(dim, rank):
                axes = axes.bfloat16()
        return axes

    def _nearest(self, queries: Tensor) -> Tensor:
        total = queries.shape[0]
        nearest = torch.empty(total, dtype=torch.int64)
        left = torch.zeros(total, dtype=torch.bool)
        size = math.ceil(total / math.ceil(total / _ROWS))
        for start in range(0, total, size):
            piece = slice(start, start + size)
            self._search_block(queries[piece], nearest[piece], left[piece])
            if _share_left(left[piece]) > _HOPELESS:
                left[start + size :] = True
                break
        rows = left.nonzero().flatten()
        if rows.numel() == total:
            return self._dense(queries)
        for part in rows.split(256):
            nearest[part] = self._dense(queries[part])
        return nearest

    def _search_block(self, queries: Tensor, into: Tensor, left: Tensor) -> None:
        """Write what the bound decides into `into`, mark the other rows in `left`."""
        state, near = self._near(queries)
        alone = state == 1
        into[alone] = near[alone, 0]
        tied = (state > 1).nonzero().flatten()
        if tied.numel():
            ranks = torch.arange(near.shape[1])
            rows, columns = (ranks < state[tied, None]).nonzero(as_tuple=True)
            settle(queries, self.codewords, tied[rows], near[tied[rows], columns], into)
        left[state <= 0] = True

    def _near(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of each row: their number (m,), at most 0 if undecided, and (m, 32) codes."""
        with full_precision(queries.device), shared_rows(queries.shape[0]) as share:
            return self._refine(queries, *self._coordinates(queries, share), share)

    def _coordinates(self, queries: Tensor, share: Share) -> tuple[Tensor, QueryTerms]:
        """Of queries (m, d): what meets the codewords' coordinates, padded, and its errors."""
        kernels, bound = self._kernels, self._bound
        rows, dim = queries.shape
        narrow = bound.turn == torch.bfloat16
        centred = torch.empty(max(rows, _LEAST_ROWS), dim, dtype=bound.turn)
        centred[rows:] = 0
        squares, lost = (torch.empty(rows, dtype=torch.float64) for _ in range(2))
        centre = kernels.centre_bfloat16 if narrow else kernels.centre_float32
        x, out = queries.numpy(), _bits(centred)
        share(centre, x, bound.centre.numpy(), out, squares.numpy(), lost.numpy())
        widen = kernels.widen_bfloat16 if narrow else kernels.widen_float32
        lengths = torch.zeros(3, rows, dtype=torch.float64)
        scales = torch.ones(centred.shape[0])
        p = centred if bound.axes is None else centred @ bound.axes
        if bound.dtype == torch.int8:
            numbers = torch.zeros(p.shape, dtype=torch.int8)
            work = (numbers.numpy(), scales.numpy(), lengths.numpy())
            share(kernels.quantise, _bits(p), widen, *work)
            p = numbers
        else:
            share(kernels.square_lengths, _bits(p), widen, lengths[0].numpy())
            lengths[2] = lengths[0]
        return p, bound.query_terms(QueryLengths(squares, lost, *lengths), scales[:rows])

    def _refine(
        self, queries: Tensor, p: Tensor, terms: QueryTerms, share: Share
    ) -> tuple[Tensor, Tensor]:
        loops, bound, rows = self._loops, self._bound, queries.shape[0]
        second = self._second
        product, dtype, bounds = self._product()
        state = torch.where(terms.usable, 0, -1)
        near = torch.empty(rows, loops.CANDIDATES, dtype=torch.int64)
        seen = torch.empty(rows, loops.CANDIDATES, dtype=torch.float64)
        tops = torch.full((rows,), math.inf, dtype=torch.float64)
        codes = self.codewords.shape[0]
        panels = _panels(codes, max(1, _PRODUCT_BYTES // (p.shape[0] * dtype.itemsize)))
        # one buffer for all panels: fresh memory costs page faults
        buffer = torch.empty(p.shape[0] * max(len(panel) for panel in panels), dtype=dtype)
        for panel in panels:
            products = buffer[: p.shape[0] * len(panel)].view(p.shape[0], len(panel))
            product(p, bound.coordinates[panel.start : panel.stop].T, out=products)
            share(
                loops.refine,
                panel.start,
                queries.numpy(),
                self.codewords.numpy(),
                _bits(products),
                bounds,
                bound.described.numpy(),
                bound.centre.numpy(),
                second.numbers.numpy(),
                second.described.numpy(),
                terms.factors.numpy(),
                terms.limits.numpy(),
                self._constants(products.shape[1] / codes),
                state.numpy(),
                near.numpy(),
                seen.numpy(),
                tops.numpy(),
            )
            if _share_left(state < 0) > _HOPELESS:
                state.fill_(-1)
                break
        return state, near

    def _product(self) -> tuple[Any, torch.dtype, Any]:
        """What multiplies coordinates, the type of the products, and the loop that reads them."""
        loops, dtype = self._loops, self._bound.dtype
        if dtype == torch.int8:
            return torch._int_mm, torch.int32, loops.bounds_int8
        if dtype == torch.bfloat16:
            return torch.mm, dtype, loops.bounds_bfloat16
        return torch.mm, dtype, loops.bounds_float32

    @property
    def _relative(self) -> float:
        """Error of the compiled sums; of distances it covers that of the float64 ones too."""
        return sum_error(self.codewords.shape[1], self._kernels.CHUNK)

    def _constants(self, part: float) -> Any:
        """For a panel of this share of the codewords (see `refine.refine`)."""
        dim, worth = self.codewords.shape[1], self.plan.worth
        most = max(1.0, min(MOST * worth, float(self.codewords.shape[0])))
        worth = worth * part
        values = [self._relative, dim * 2.0**-125, most, _EARNED * worth, _WASTE * worth, LOOK]
        return torch.tensor(values, dtype=torch.float64).numpy()


def _panels(codes: int, most: int) -> list[range]:
    """Codewords in panels of at most `most`, of about one size but for the first.

    That one is small: after it a batch that defeats the bound is known, and has cost little.
    """
    first = min(most, math.ceil(codes * _FIRST))
    count = math.ceil((codes - first) / most)
    edges = (
        [0, *(first + (codes - first) * part // count for part in range(count))] if count else [0]
    )
    return [range(*pair) for pair in pairwise([*edges, codes])]


def _share_left(left: Tensor) -> float:
    return int(left.sum()) / left.shape[0]


def _product_type(wanted: str, rank: int, dim: int, codes: int) -> torch.dtype:
    """The type of the coordinates: what the plan says where its products are sound here."""
    if wanted == "int8" and multiplies_int8(rank, codes):
        return torch.int8
    narrow = wanted != "float32" and _sums_in_float32(rank, codes)
    if narrow and (rank == dim or _sums_in_float32(dim, rank)):
        return torch.bfloat16
    return torch.float32


def _sums_in_float32(inner: int, columns: int) -> bool:
    """Whether a bfloat16 product of this shape, on this processor, adds in float32.

    Small ones take another path through torch, which is not relied upon. In bfloat16 a sum of ones
    would stop at 256.
    """
    if not has_bfloat16() or inner * columns < 2**14:
        return False
    ones = torch.ones(_LEAST_ROWS, inner, dtype=torch.bfloat16)
    sums = ones @ torch.ones(columns, inner, dtype=torch.bfloat16).T
    return bool((sums == torch.tensor(float(inner)).to(torch.bfloat16)).all())


def _bits(tensor: Tensor) -> Any:
    """The numpy view of a float32 tensor, or of the bits of a bfloat16 one."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
