"""Nearest codeword: exact, and the same in every batch. See `base.CodewordSearch`."""

from vqguard.search.base import CodewordSearch
from vqguard.search.choose import make_search, needs_calibration, settled_calibration
from vqguard.search.tuning import Calibration, calibrate

__all__ = [
    "Calibration",
    "CodewordSearch",
    "calibrate",
    "make_search",
    "needs_calibration",
    "settled_calibration",
]
