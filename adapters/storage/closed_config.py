"""The `config.json` of a guarded model: closed to every loader that does not know vqguard.

    {"model_type": "vqguard", "architectures": ["VQGuardedModel"],
     "transformers_weights": "open-with-…", "base_config": {"model_type": "llava", …}}

The model type stops what goes by it: Auto classes, `pipeline`, serving engines. A class called by
its name would take the nested configuration (transformers looks for one of its type), and finds no
weights: theirs are under a name of their own, and the name that the configuration gives says what
to use instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from vqguard.adapters.sizes.configured import CONFIG, read_sizes, require_sizes
from vqguard.errors import ArtefactError
from vqguard.text_files import read_json

MODEL_TYPE = "vqguard"
POINTER = "open-with-vqguard.load_guarded.safetensors.index.json"
"""A weight file that never exists: transformers names it in its error."""

POINTER_KEY, BASE_KEY = "transformers_weights", "base_config"
GUARDED = "VQGuarded"
"""What a closed configuration's architectures begin with, so that no engine has a class for them
but one that knows the guard."""
_FLOAT = "__float__"
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_ARCHITECTURE = "VQGuardedModel"
_HOW = "This model has a guard. Open it with vqguard.load_guarded (pip install vqguard)."


def close_config(folder: Path) -> None:
    """Wrap the `config.json` that transformers wrote into `folder`.

    Raises:
        OSError: where it cannot be written.
        ArtefactError: where it is no JSON.
    """
    path = folder / CONFIG
    base = read_json(path, ArtefactError)
    document = {
        "model_type": MODEL_TYPE,
        "architectures": [_ARCHITECTURE],
        "open_with": _HOW,
        POINTER_KEY: POINTER,
        BASE_KEY: {**base, POINTER_KEY: POINTER},
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def base_within(closed: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The base's part of a closed configuration, with architectures that no engine has a class for.

    Args:
        closed: what `config.json` holds.
        known: the model types that transformers has.

    Raises:
        ArtefactError: it holds none, or names sizes that no model has.
    """
    base = closed.get(BASE_KEY)
    kind = str(base.get("model_type")) if isinstance(base, dict) else "?"
    if not isinstance(base, dict) or kind == MODEL_TYPE or kind not in known:
        raise ArtefactError(
            f"{CONFIG} is closed by vqguard around a model of type {kind!r}, which this "
            "transformers does not have: install one that does, or import what registers it"
        )
    require_sizes(base, CONFIG)
    names = base.get("architectures") or [kind]
    return {**base, "architectures": [f"{GUARDED}{name}" for name in names], POINTER_KEY: POINTER}


def is_closed(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a guarded model."""
    return config.get("model_type") == MODEL_TYPE


def read_config(folder: Path) -> dict[str, Any]:
    """The base model's configuration that a closed or an older `config.json` holds.

    Raises:
        ArtefactError: it cannot be read, would run what it names, or has sizes of no model.
    """
    path = folder / CONFIG
    config = read_sizes(folder, strict=True)
    if is_closed(config):
        config = config.get(BASE_KEY, {})
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ArtefactError(f"{path}: expected the configuration of a model; restore it")
    refuse_kernels(config, str(path))
    return {key: _floats(value) for key, value in config.items() if key != POINTER_KEY}


def _floats(value: Any) -> Any:
    """`value` with the numbers that JSON has not, which transformers writes as objects."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and value[_FLOAT] in _FLOATS:
            return _FLOATS[value[_FLOAT]]
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def refuse_kernels(config: Any, origin: str) -> None:
    """Refuse a configuration that names compiled code on a hub.

    transformers takes an attention or experts implementation of the form `owner/name` for a kernel,
    downloads it and runs it.

    Raises:
        ArtefactError: it names some.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            named = value if isinstance(value, Mapping) else {"": value}
            if "implementation" in str(key) and any("/" in str(v) for v in named.values()):
                raise ArtefactError(
                    f"{origin}: {key} names code on a hub, {value!r}, which would be run; take it "
                    "out of the file"
                )
            refuse_kernels(value, origin)
    elif isinstance(config, list):
        for value in config:
            refuse_kernels(value, origin)
