"""One name for all back ends."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.search.backend_table import AUTO, backend_class, backend_problem, backends_on
from vqguard.search.base import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.tuning import Calibration, calibrate, tuned_search, usable

_log = logging.getLogger("vqguard.search")
_MEASURE = "measure"
WORTH_AN_INDEX = 4096
"""Codebooks below this size are searched as fast by torch, without a second copy of them."""

_WORTH_FOLLOWING = 256
"""Queries a step: fewer are searched as fast as codewords that moved are looked through."""


def make_search(
    codewords: Tensor, backend: str = "auto", calibration: Calibration | None = None
) -> CodewordSearch:
    """Return the exact nearest-codeword search over `codewords` (P, d), any float dtype.

    `backend`: "torch" (any device), "pruned" and "faiss" (CPU tensors), "tensor-cores" and
    "faiss-gpu" (CUDA tensors), or "auto", which picks by shape and device, and by `calibration`
    where a large codebook is on the CPU or on CUDA; one that is missing or of another machine is
    measured. All give the same answers.

    Raises:
        ConfigError: for a back end that is unknown or cannot run here.
    """
    fits = calibration is not None and calibration.fits(codewords)
    if backend == AUTO and not fits and needs_calibration(codewords):
        return settled_search(codewords, calibration)[0]
    chosen = choose(codewords, backend, calibration)
    if backend == AUTO:
        _announce(chosen.backend, chosen.reason)
    plan = calibration.plan if calibration is not None and fits else None
    return backend_class(chosen.backend)(codewords, plan)


class Choice(NamedTuple):
    """A back end and why it is that one."""

    backend: str
    """Its name in the table of back ends."""
    reason: str
    measured: Calibration | None
    """What was measured, where that decided."""


def choose(
    codewords: Tensor, backend: str = AUTO, calibration: Calibration | None = None
) -> Choice:
    """What `make_search` takes, without making it; arguments and errors are the same."""
    problem = backend_problem(backend)
    if problem:
        raise ConfigError(problem)
    if backend != AUTO:
        return Choice(backend, "the configuration names it", None)
    backend, reason = _by_shape(codewords)
    if backend != _MEASURE:
        return Choice(backend, reason, None)
    measured = settled_calibration(codewords, calibration)
    reason = measured.reason or "fastest where it was measured"
    return Choice(measured.backend, reason, measured)


def needs_calibration(codewords: Tensor) -> bool:
    """Whether "auto" looks at a calibration for `codewords`."""
    return _by_shape(codewords)[0] == _MEASURE


def settled_calibration(
    codewords: Tensor, known: Calibration | None, queries: Tensor | None = None
) -> Calibration:
    """`known` where it fits this shape and machine, else measured, on `queries` (M, d) if any."""
    if known is not None and known.fits(codewords):
        return known
    return calibrate(codewords, queries)


def settled_search(
    codewords: Tensor, known: Calibration | None, queries: Tensor | None = None
) -> tuple[CodewordSearch, Calibration]:
    """What "auto" takes where `needs_calibration`, and its calibration as `settled_calibration`.

    A search that was made to be measured is not made again.
    """
    if known is not None and known.fits(codewords):
        return make_search(codewords, AUTO, known), known
    search, measured = tuned_search(codewords, queries)
    _announce(measured.backend, measured.reason)
    return search, measured


def moving_search(codewords: Tensor, queries: Tensor) -> CodewordSearch:
    """What "auto" takes for codewords (P, d) that are trained, so that every search sees others.

    `queries` (M, d): of one step. What has to be built anew at every step is not taken.
    """
    home = codewords.device.type
    if home == "cpu" and needs_calibration(codewords) and queries.shape[0] >= _WORTH_FOLLOWING:
        search, _ = tuned_search(codewords, queries)
        if search.follows:
            return search
    return DenseSearch(codewords)


def _by_shape(codewords: Tensor) -> tuple[str, str]:
    device = codewords.device.type
    special = [backend for backend in backends_on(device) if backend is not DenseSearch]
    if not special:
        return DenseSearch.name, f"the codewords are on {device}"
    if codewords.shape[0] < WORTH_AN_INDEX:
        return DenseSearch.name, f"{codewords.shape[0]} codewords do not need an index"
    if device == "cpu" or (device == "cuda" and len(usable(device)) > 1):
        return _MEASURE, ""
    problems = []
    for backend in special:
        problem = backend.problem() if backend.automatic else "not to be taken unasked"
        if problem is None:
            return backend.name, f"it runs here, and the codewords are on {device}"
        problems.append(f"{backend.name}: {problem}")
    return DenseSearch.name, "; ".join(problems)


@lru_cache(maxsize=16)
def _announce(backend: str, reason: str) -> None:
    _log.info("nearest codeword by %s: %s", backend, reason)
