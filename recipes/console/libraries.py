"""What other libraries say while a command runs: nothing that its user could act on is kept."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Read on import by `huggingface_hub`, whose setting transformers follows, and by `datasets`."""
_KERNELS = "bitsandbytes.backends"
"""Says which kernels it does not find; it has others."""
_RENAMED = r".*`?past_key_values`?.* (is|are) deprecated"
"""How transformers' models call transformers' own functions: a warning, or a line of its log."""
_FUNCTIONS = "transformers.utils.generic"


def quiet_libraries() -> None:
    """Keep notices of libraries about themselves out of a log; call it before they are imported.

    Without a terminal no bars are drawn, each of whose steps would be a line.
    """
    if not sys.stderr.isatty():
        for name in _BARS:
            os.environ.setdefault(name, "1")
    logging.getLogger(_KERNELS).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=_RENAMED)
    logging.getLogger(_FUNCTIONS).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return re.match(_RENAMED, record.getMessage()) is None


def end_bars() -> None:
    """Leave the line of a bar that an error interrupted, so that what follows has its own."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()
