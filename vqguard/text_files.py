"""Strict YAML and JSON: safe loaders that refuse a key given twice, NaN and infinity."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from vqguard.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            line = node.start_mark.line + 1
            raise ConfigError(
                f"key given twice: {', '.join(repeated)} (in the mapping that starts on line"
                f" {line}). Keep one of them."
            )
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where "1e-3" is a string: learning rates would be refused as mistyped.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, origin: str = "YAML text") -> Any:
    """Read YAML with a safe loader.

    Raises:
        ConfigError: naming `origin` on a syntax error.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error


def parse_json(text: str, origin: str = "JSON text") -> Any:
    """Read JSON; refuse keys given twice, NaN and infinity.

    Raises:
        ConfigError: naming `origin`.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        if repeated:
            raise ConfigError(f"{origin}: key given twice: {', '.join(repeated)}.")
        return dict(items)

    def constant(name: str) -> Any:
        raise ConfigError(f"{origin}: {name} is not a finite number.")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid JSON: {error}") from error
