"""What every nearest-codeword search promises, and the checks that come before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError, NonFiniteError
from vqguard.search.plan import Plan

MAX_DIM = 2**20
"""Widest vector for which the error margins of `settle.margin` were derived."""


class CodewordSearch(ABC):
    """Nearest codeword in Euclidean distance, exact, ties to the lowest index.

    The answer for a query is the index that minimises `settle.distances` (float64, in a fixed order
    of operations) over all codewords. It does not depend on the other queries of the batch, on
    chunking, threads or back end. Queries and codewords are cast to float32 first, float64 ones
    too: a query has one answer in whatever wider type it arrives.

    The codewords are kept by reference where they are float32 and contiguous. Whoever changes them
    calls `refresh` before the next search.
    """

    name: ClassVar[str] = ""
    """What it is called in `GuardConfig.search` and in the table of back ends."""
    devices: ClassVar[tuple[str, ...] | None] = None
    """The device types of tensors that it takes; None: all."""
    automatic: ClassVar[bool] = True
    """Whether "auto" may take it unasked."""
    follows: ClassVar[bool] = False
    """Whether `refresh` costs little where codewords have moved a little."""
    remedy: ClassVar[str] = "Choose search='torch'"
    """What to do about `problem()`, for the error."""

    codewords: Tensor
    plan: Plan | None = None
    """What tuning kept for this back end, where it has choices of its own."""

    def __init__(self, codewords: Tensor, plan: Plan | None = None) -> None:
        """`codewords` as in `refresh`; `plan` from an earlier tuning.

        Raises:
            ConfigError: where the back end cannot run here.
        """
        problem = self.problem()
        if problem:
            raise ConfigError(f"the {self.name} back end cannot run: {problem}. {self.remedy}")
        self.wanted = plan
        self.refresh(codewords)

    @classmethod
    def problem(cls) -> str | None:
        """Why this back end cannot run on this machine, or None."""
        return None

    @classmethod
    def candidates(
        cls, codewords: Tensor, queries: Tensor, dense_seconds: float
    ) -> list[CodewordSearch]:
        """Searches over `codewords` (P, d) that tuning times; several or none, by their plans.

        `queries` (M, d) are like those to come. `dense_seconds`: a dense search takes, a query.
        """
        return [cls(codewords)]

    def refresh(self, codewords: Tensor) -> None:
        """Take the codewords (P, d), any float dtype, and recompute what is derived from them.

        Raises:
            InputError: on a wrong shape or dtype.
            NonFiniteError: naming the codeword.
        """
        _check_matrix(codewords, "codewords")
        if codewords.shape[0] < 1 or not 1 <= codewords.shape[1] <= MAX_DIM:
            raise InputError(
                f"expected at least one codeword of 1 to {MAX_DIM} numbers, got shape"
                f" {tuple(codewords.shape)}"
            )
        self._check_supported(codewords)
        with torch.no_grad():
            self.codewords = _finite_float32(codewords, "codeword")
            self._prepare()

    def __call__(self, queries: Tensor) -> Tensor:
        """Index of the nearest codeword of each query: (M, d) any float dtype -> (M,) int64.

        Raises:
            InputError: on a wrong shape, dtype or device.
            NonFiniteError: naming the query's row.
        """
        _check_matrix(queries, "queries")
        if queries.shape[1] != self.codewords.shape[1]:
            raise InputError(
                f"queries have width {queries.shape[1]}, the codewords {self.codewords.shape[1]};"
                " take the features at the site that the guard was built for"
            )
        self._check_device(queries)
        with torch.no_grad():
            queries = self._accepted(queries)
            if queries.shape[0] == 0:
                return torch.empty(0, dtype=torch.int64, device=queries.device)
            return self._nearest(queries)

    def _check_supported(self, tensor: Tensor) -> None:
        if self.devices is not None and tensor.device.type not in self.devices:
            home = " or ".join(self.devices).upper()
            raise InputError(
                f"{self.name} is a {home} back end and got a tensor on {tensor.device}; it would be"
                f" copied for every image. Move it, or choose search='auto'"
            )

    def _check_device(self, queries: Tensor) -> None:
        self._check_supported(queries)
        if queries.device != self.codewords.device:
            raise InputError(
                f"queries are on {queries.device}, the codewords on {self.codewords.device};"
                " move one of them"
            )

    def _accepted(self, queries: Tensor) -> Tensor:
        """Float32, contiguous, finite; a back end that checks later raises the same there."""
        return _finite_float32(queries, "query")

    @abstractmethod
    def _prepare(self) -> None:
        """Recompute what is derived from `self.codewords`."""

    @abstractmethod
    def _nearest(self, queries: Tensor) -> Tensor:
        """Indices (M,) for finite, contiguous float32 queries (M, d), M >= 1."""


def _check_matrix(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise InputError(
            f"{name}: expected a floating-point matrix, got shape {tuple(tensor.shape)},"
            f" {tensor.dtype}"
        )


def _finite_float32(tensor: Tensor, name: str) -> Tensor:
    tensor = tensor.detach().to(torch.float32).contiguous()
    if tensor.numel() == 0:
        return tensor
    # the extremes carry every NaN and infinity, without a mask of the tensor's size
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        finite = torch.isfinite(tensor).all(dim=1)
        rows = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{name} in row {rows[0]} holds NaN, infinity or a number beyond float32"
            f" ({len(rows)} such row{'s' if len(rows) > 1 else ''}); it has no nearest codeword."
            " Look for an overflow in half precision before the guard."
        )
    return tensor
