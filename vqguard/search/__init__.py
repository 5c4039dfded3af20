"""Nearest codeword: exact, and the same in every batch. See `base.CodewordSearch`.

Names are loaded when first used: a configuration reads the table of back ends without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vqguard.lazy import lazy_names

# For type checkers and editors, which take a name with an alias for public; nothing is imported.
# isort: off
if TYPE_CHECKING:
    from vqguard.search.base import CodewordSearch as CodewordSearch
    from vqguard.search.choose import (
        make_search as make_search,
        moving_search as moving_search,
        needs_calibration as needs_calibration,
        settled_calibration as settled_calibration,
        settled_search as settled_search,
    )
    from vqguard.search.backend_table import (
        add_backend as add_backend,
        backend_choices as backend_choices,
    )
    from vqguard.search.tuning import Calibration as Calibration, calibrate as calibrate
# isort: on

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "base": ["CodewordSearch"],
        "choose": [
            "make_search",
            "moving_search",
            "needs_calibration",
            "settled_calibration",
            "settled_search",
        ],
        "backend_table": ["add_backend", "backend_choices"],
        "tuning": ["Calibration", "calibrate"],
    },
)
