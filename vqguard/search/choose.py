"""One name for all back ends."""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

from torch import Tensor

from vqguard.config import SEARCH_BACKENDS
from vqguard.errors import ConfigError
from vqguard.names import nearest
from vqguard.search.base import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.pruned import PrunedSearch
from vqguard.search.tuning import Calibration, calibrate

_log = logging.getLogger("vqguard.search")
WORTH_AN_INDEX = 4096
"""Codebooks below this size are searched as fast by torch, without a second copy of them."""


def make_search(
    codewords: Tensor, backend: str = "auto", calibration: Calibration | None = None
) -> CodewordSearch:
    """Return the exact nearest-codeword search over `codewords` (P, d), any float dtype.

    `backend`: "torch" (any device), "pruned" and "faiss" (CPU tensors), "faiss-gpu" (CUDA tensors),
    or "auto", which picks by shape and device, and by `calibration` where a large codebook is on
    the CPU; one that is missing or of another machine is measured. All give the same answers.
    Raises ConfigError for a back end that is unknown or cannot run here.
    """
    if backend not in SEARCH_BACKENDS:
        hint = nearest(backend, SEARCH_BACKENDS)
        raise ConfigError(f"unknown search back end {backend!r}.{hint}")
    if backend == "auto":
        backend, reason = _choose(codewords)
        if backend == "calibrate":
            calibration = settled_calibration(codewords, calibration)
            backend, reason = calibration.backend, "fastest where it was measured"
        _announce(backend, reason)
    if backend == "torch":
        return DenseSearch(codewords)
    if backend == "pruned":
        fits = calibration is not None and calibration.fits(codewords)
        return PrunedSearch(codewords, calibration.plan if fits and calibration else None)
    from vqguard.search.faiss_index import FaissGpuSearch, FaissSearch

    return FaissSearch(codewords) if backend == "faiss" else FaissGpuSearch(codewords)


def needs_calibration(codewords: Tensor) -> bool:
    """Whether "auto" looks at a calibration for `codewords`."""
    return _choose(codewords)[0] == "calibrate"


def settled_calibration(
    codewords: Tensor, known: Calibration | None, queries: Tensor | None = None
) -> Calibration:
    """`known` where it fits this shape and machine, else measured, on `queries` (M, d) if any."""
    if known is not None and known.fits(codewords):
        return known
    return calibrate(codewords, queries)


def _choose(codewords: Tensor) -> tuple[str, str]:
    if codewords.device.type not in ("cpu", "cuda"):
        return "torch", f"the codewords are on {codewords.device.type}"
    if codewords.shape[0] < WORTH_AN_INDEX:
        return "torch", f"{codewords.shape[0]} codewords do not need an index"
    if codewords.device.type == "cuda":
        if importlib.util.find_spec("faiss") is None:
            return "torch", "faiss is not installed"
        from vqguard.search.faiss_index import gpu_problem

        problem = gpu_problem()
        return ("torch", problem) if problem else ("faiss-gpu", "codewords on CUDA, faiss sees it")
    return "calibrate", ""


@lru_cache(maxsize=16)
def _announce(backend: str, reason: str) -> None:
    _log.info("nearest codeword by %s: %s", backend, reason)
