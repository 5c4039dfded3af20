"""What lmms-eval's own models make of a folder, as JSON: `guarded`, `opened`, or an error.

`python opening_program.py without|with FOLDER`: whether vqguard can be imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

if sys.argv[1] == "without":
    sys.modules["vqguard"] = None  # type: ignore[assignment]

from lmms_eval.models import get_model, list_available_models

LOADERS: dict[str, dict[str, Any]] = {
    "huggingface": {"device": "cpu", "device_map": "cpu"},
    "llava_hf": {"device": "cpu"},
    "vqguard": {},
}


def tried(name: str, simple: bool) -> str:
    try:
        made = get_model(name, force_simple=simple)(pretrained=sys.argv[2], **LOADERS[name])
    except Exception as error:  # whatever it raises
        return f"{type(error).__name__}: {error}"
    model = made.run.model if name == "vqguard" else made.model
    guarded = getattr(model, "vqguard", None) is not None
    return "guarded" if guarded else f"opened: {type(model).__name__}"


if __name__ == "__main__":
    found = {
        f"{name}, simple: {simple}": tried(name, simple)
        for name in LOADERS
        for simple in (False, True)
    }
    print(json.dumps({"listed": "vqguard" in list_available_models(), "tried": found}))
