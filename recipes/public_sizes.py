"""Sizes of public checkpoints, kept in the package so that planning needs no hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vqguard.errors import ConfigError
from vqguard.strict import StrictConfig
from vqguard.text_files import parse_json


@dataclass(frozen=True)
class PublicConfig(StrictConfig):
    """What a checkpoint's published `config.json` says about its sizes."""

    checkpoint: str
    """Id of the checkpoint."""
    source: str
    """Where the sizes were read."""
    visual_tokens: int
    """Visual tokens of the largest image that a plan counts with."""
    config: dict[str, Any]
    """The fields of `config.json` that decide parameters and memory."""


def public_configs() -> list[PublicConfig]:
    """Every checkpoint whose sizes are in the package."""
    folder = files("vqguard.recipes") / "public_configs"
    entries = sorted(
        (e for e in folder.iterdir() if e.name.endswith(".json")), key=lambda e: e.name
    )
    return [
        PublicConfig.from_dict(parse_json(entry.read_text(encoding="utf-8"), entry.name))
        for entry in entries
    ]


def public_config(checkpoint: str) -> PublicConfig | None:
    """The sizes of a checkpoint by its id; None if the package does not know them."""
    return next((sizes for sizes in public_configs() if sizes.checkpoint == checkpoint), None)


def check_loaded(model: Any, checkpoint: str) -> list[str]:
    """Hold a loaded checkpoint against the sizes that plans were made with.

    Training takes every size from the checkpoint itself. Other sizes make the plan wrong and
    nothing else.

    Returns:
        The fields that differ, as sentences.

    Raises:
        ConfigError: it is another kind of model, so that the recipe is not for it.
    """
    known = public_config(checkpoint)
    if known is None:
        return []
    config = model.config.to_dict()
    kind, wanted = config.get("model_type"), known.config["model_type"]
    if kind != wanted:
        raise ConfigError(
            f"{checkpoint} is a {kind!r}, and its recipe is for a {wanted!r}. If it was replaced "
            "on the hub, load an earlier revision from a folder, or write a recipe with --config."
        )
    return list(_different(known.config, config, ""))


def _different(known: Mapping[str, Any], config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in known.items():
        if key == "model_type" and prefix:
            continue  # the parts' types have been renamed by transformers, their sizes have not
        other = config.get(key, config.get(_RENAMED.get(key, "")))
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _different(value, other, f"{prefix}{key}.")
        elif _plain(other) != _plain(value):
            yield f"{prefix}{key} is {other!r}, expected {value!r}"


_RENAMED = {"image_token_index": "image_token_id", "image_token_id": "image_token_index"}
"""transformers has renamed this field and keeps the other as an alias."""


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
