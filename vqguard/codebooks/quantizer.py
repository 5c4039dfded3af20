"""One level of the bottleneck: features in, codewords out.

Without an estimator the output is the codeword, detached: no gradient crosses. How gradients cross
when they should, in training and in adaptive attacks, is an explicit context:

    with straight_through(guard):
        loss = ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqguard.codebooks.codebook import Codebook
from vqguard.codebooks.losses import codebook_loss, commitment_loss
from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.errors import ConfigError, InputError, NonFiniteError
from vqguard.scopes.context import Opened
from vqguard.search import (
    Calibration,
    CodewordSearch,
    make_search,
    moving_search,
    needs_calibration,
    settled_search,
)

Estimator = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (..., d), codebook weight (P, d), indices (...,) int64) -> output (..., d)."""


_REBUILDING = threading.RLock()
"""Held while a search is made or refreshed: threads share it."""
_MOVING = "moving"
"""In place of "auto" while the codebook learns."""
_THREAD_COUNTS = 2
"""Searches kept at a time, each for its number of threads; an index is as large as the codebook."""


class Quantized(NamedTuple):
    """What a quantiser returns; the losses are scalars while it learns and None otherwise."""

    output: Tensor
    """(..., d) codewords in the input's dtype."""
    indices: Tensor
    """(...,) int64 codes."""
    codebook_loss: Tensor | None
    """|q(x) - sg[x]|^2, mean over elements; its gradient reaches the codebook only."""
    commitment_loss: Tensor | None
    """|x - sg[q(x)]|^2, mean over elements, not yet weighted; its gradient reaches x only."""


class VectorQuantizer(nn.Module):
    """Codebook, exact search and the two losses of one level.

    It *learns* while in training mode with a codebook that requires a gradient: then uses are
    counted and the losses computed. A frozen codebook stays as it is in `train()` too.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        commitment_weight: float = 0.25,
        search: str = "auto",
        seed: int = 0,
    ) -> None:
        """P = `codes` entries of width `dim`; `search` as in `vqguard.search.make_search`."""
        super().__init__()
        self.codebook = Codebook(codes, dim, seed)
        self.commitment_weight = commitment_weight
        self.backend = search
        self.calibration: Calibration | None = None  # kept with the guard
        self._replicated: Estimator | None = None  # only in replicas of DataParallel
        self._searches: dict[tuple[Any, ...], _Search] = {}  # by back end, device, threads

    @property
    def learning(self) -> bool:
        """Whether losses and counts are kept: training mode and a codebook with gradient."""
        return self.training and self.codebook.weight.requires_grad

    def encode(self, x: Tensor) -> Tensor:
        """Codes (...,) int64 of features (..., d), any float dtype, without side effects.

        Raises:
            InputError: for another width.
            NonFiniteError: for NaN or infinity.
        """
        if x.dim() < 1 or x.shape[-1] != self.codebook.dim:
            width = x.shape[-1] if x.dim() else "none"
            raise InputError(
                f"features have width {width} (shape {tuple(x.shape)}), the codebook has"
                f" {self.codebook.dim}; take them at the site that the guard was built for"
            )
        flat = x.detach().reshape(-1, self.codebook.dim)
        return self._nearest(flat).reshape(x.shape[:-1])

    def lookup(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codewords (..., d) of `indices` (...,), detached.

        float32 and float64 hold them bit for bit. In half precision each is rounded once, to
        nearest: what leaves the guard is still one of P fixed vectors.

        Raises:
            NonFiniteError: where a codeword does not fit the dtype.
        """
        out = self.codebook.weight.detach()[indices].to(dtype)
        if dtype == torch.float16 and not bool(torch.isfinite(out).all()):
            raise NonFiniteError(
                "a codeword is beyond the range of float16 (65504); run the model in bfloat16"
            )
        return out

    def codewords(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`lookup` of codes (...,) of any integer dtype that come from outside.

        They are moved to the codebook's device; checking them where they lie keeps it from waiting.

        Raises:
            InputError: for a code that is no entry.
            NonFiniteError: where a codeword does not fit the dtype.
        """
        codes = codes.to(torch.int64)
        size = self.codebook.codes
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
            raise InputError(
                f"expected codes in [0, {size}), got {int(codes.min())} to {int(codes.max())}: "
                "they are of another codebook"
            )
        return self.lookup(codes.to(self.codebook.weight.device), dtype)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise features (..., d), any float dtype; the output has the input's dtype.

        Raises as `encode` and `lookup` do.
        """
        output, indices = self.replace(x)
        if not self.learning:
            return Quantized(output, indices, None, None)
        self.codebook.count(indices)
        entries = nn.functional.embedding(indices, self.codebook.weight)
        return Quantized(output, indices, codebook_loss(x, entries), commitment_loss(x, entries))

    def replace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codewords and codes as `forward` gives them; nothing is counted, nothing learns."""
        indices = self.encode(x)
        estimator = self._estimator()
        if estimator is None:
            return self.lookup(indices, x.dtype), indices
        return estimator(x, self.codebook.weight, indices), indices

    def _estimator(self) -> Estimator | None:
        """The innermost one that this context has put in force for this quantiser."""
        uses = reversed(_USES.values())
        return next((use.estimator for use in uses if self in use.quantizers), self._replicated)

    def _replicate_for_data_parallel(self) -> VectorQuantizer:
        # replicas run in threads of their own, without the context of the call
        replicate: Any = super()._replicate_for_data_parallel
        replica: VectorQuantizer = replicate()
        replica._replicated = self._estimator()
        return replica

    def refresh(self) -> None:
        """Forget what was derived from the codebook.

        Needed only after its storage was written through `.data`, which torch does not record.
        """
        self._searches = {}

    def _nearest(self, queries: Tensor) -> Tensor:
        state = self._state()
        held = self._searches.get(state[:3])
        known = held is not None and held.entries == state[3:] and state[-1] is not None
        if held is None or not known or self.learning:
            with _REBUILDING:
                held = self._current_search(queries)
                if state[-1] is None:  # refreshed at every use: not while another thread searches
                    return held.search(queries)
        return held.search(queries)

    def _state(self) -> tuple[Any, ...]:
        """(back end, device, threads, address, version) of a search of the entries as they are.

        The version is None where torch keeps none.
        """
        weight = self.codebook.weight.detach()
        # an index is not rebuilt for every training step
        backend = _MOVING if self.learning and self.backend == "auto" else self.backend
        version = None if weight.is_inference() else weight._version
        # what is fastest for one number of threads need not be for another
        threads = torch.get_num_threads() if backend in ("auto", _MOVING) else 0
        return (backend, weight.device, threads, weight.data_ptr(), version)

    def _current_search(self, queries: Tensor) -> _Search:
        weight, state = self.codebook.weight.detach(), self._state()
        place, version = state[:3], state[-1]
        alike = {where: held for where, held in self._searches.items() if where[:2] == place[:2]}
        if place not in alike and len(alike) >= _THREAD_COUNTS:
            # All give the same answers: none is rebuilt because threads take turns.
            place = next(iter(alike))
        held = alike.get(place)
        if held is None:
            if place[0] == _MOVING:
                search = moving_search(weight, queries)
            elif place[0] == "auto" and needs_calibration(weight):
                enough = queries if queries.shape[0] >= 64 else None
                search, self.calibration = settled_search(weight, self.calibration, enough)
            else:
                search = make_search(weight, place[0], self.calibration)
            held = _Search(search, state[3:])
        elif held.entries != state[3:] or version is None or self.learning:
            held.search.refresh(weight)
            held = _Search(held.search, state[3:])
        self._searches = {**alike, place: held}
        return held

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts without an estimator, and with a search over its own entries
        return {**self.__dict__, "_replicated": None, "_searches": {}}

    def extra_repr(self) -> str:
        return f"search={self.backend!r}, commitment_weight={self.commitment_weight}"


def straight_through_estimator(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """The estimator x + sg[q(x) - x] of Bengio et al. 2013, its value q(x) bit for bit.

    The formula itself would return a rounded sum. No gradient reaches the codebook.
    """
    return with_gradient_of(x, weight.detach()[indices].to(x.dtype))


class _Search(NamedTuple):
    """A search, and of which entries: their address and version."""

    search: CodewordSearch
    entries: tuple[Any, ...]


class _Use(NamedTuple):
    """One block of `use_estimator`."""

    estimator: Estimator
    quantizers: frozenset[VectorQuantizer]


_USES: Opened[_Use] = Opened("vqguard_estimators")


@contextmanager
def use_estimator(module: nn.Module, estimator: Estimator) -> Iterator[None]:
    """Inside, every `VectorQuantizer` of `module` outputs estimator(x, weight, indices).

    The module itself may be one. Contexts nest, and the previous state comes back on an exception.
    Codes and verdicts do not change. It is in force in this thread or task alone: what others
    compute on the same module meanwhile stays quantised.

    Raises:
        ConfigError: if there is no quantiser in `module`.
    """
    quantizers = frozenset(part for part in module.modules() if isinstance(part, VectorQuantizer))
    if not quantizers:
        raise ConfigError(
            f"{type(module).__name__} holds no VectorQuantizer; pass the guard or a guarded model"
        )
    with _USES.put(_Use(estimator, quantizers)):
        yield


@contextmanager
def straight_through(module: nn.Module) -> Iterator[None]:
    """Inside, gradients cross every quantiser of `module` as if it were the identity.

    For stage-1 training and for adaptive attacks (BPDA, Athalye et al. 2018). Values are unchanged.
    """
    with use_estimator(module, straight_through_estimator):
        yield
