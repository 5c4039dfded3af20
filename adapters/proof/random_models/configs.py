"""Which families have tiny models, and what their configs need beyond smaller sizes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

LEFT_OUT = {
    "evolla": "it reads proteins, no pixels",
    "mistral4": "it reads text only",
}
"""Types of the mapping that see no pixels, with the reason."""


@cache
def changes() -> dict[str, dict[str, Any]]:
    """For each type, values at dotted paths of its config."""
    text = (Path(__file__).parent / "changes.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found
