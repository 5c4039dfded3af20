"""Strict YAML and JSON: what comes from outside is read within bounds, or refused by name.

Refused are a key given twice, NaN and infinity (in JSON), numbers beyond 64 bits, deep nesting,
lone surrogates, and YAML's aliases, by which a few hundred bytes stand for gigabytes.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from vqguard.bounded import read_text
from vqguard.errors import ConfigError, VQGuardError

MAX_DOCUMENT = 16 * 2**20
"""Bytes of a JSON document of the project's own (guard, manifest, card, index). The largest, the
counts of 16 384 cells and 60 categories, have 10 MB; read, a document takes up to 25 times its
bytes."""
MAX_YAML = 2**17
"""Characters of a YAML text: PyYAML reads some 100 000 in a second, and a recipe has 3 000."""
MAX_DEPTH = 64
"""Lists and mappings inside one another; the project's own files have 8. What is deeper ends in
the recursion limit of whoever uses it."""
MAX_DIGITS = 100
"""Characters of a whole number: n digits take n² steps to read."""
MAX_PARTS = 40_000_000
"""Lists and mappings of one JSON text; each takes some 70 bytes, and may be written in three.
LLaVA's mix of 665 000 conversations has 8 million."""

_SURROGATE = re.compile(r"\\[uU][dD][89a-fA-F]")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2) and refuses what the module names."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's own
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1
            raise ConfigError(
                f"anchors (&name) and aliases (*name) are not accepted (line {line}); write the"
                " values out where they are used"
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(_TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        # a key that is a list cannot be in a dict: the loader below says so
        repeated = _repeated([key for key in keys if key.__hash__ is not None])
        if repeated:
            line = node.start_mark.line + 1
            raise ConfigError(
                f"key given twice: {', '.join(repeated)} (in the mapping that starts on line"
                f" {line}). Keep one of them."
            )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _check_digits(str(self.construct_scalar(node)))
        number: int = super().construct_yaml_int(node)
        return number


# PyYAML follows YAML 1.1, where "1e-3" is a string: learning rates would be refused as mistyped.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_TOO_DEEP = f"lists and mappings lie more than {MAX_DEPTH} deep; use fewer levels"


def parse_yaml(text: str, origin: str = "YAML text") -> Any:
    """Read YAML with a safe loader.

    Raises:
        ConfigError: naming `origin`, whatever is wrong with the text.
    """
    if len(text) > MAX_YAML:
        raise ConfigError(
            f"{origin} has {len(text):,} characters, at most {MAX_YAML:,} are read; split it"
        )
    try:
        document = yaml.load(text, Loader=_Loader)
        _require_characters(document)
        return document
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except Exception as error:
        # PyYAML lets nearly anything out (ValueError for the date 2001-99-99, AttributeError,
        # IndexError, KeyError for tags that do not fit)
        raise ConfigError(f"{origin} is not valid YAML: {error}") from error


def parse_json(text: str, origin: str = "JSON text", *, strict: bool = True) -> Any:
    """Read JSON.

    Args:
        text: what to read.
        origin: how messages call it.
        strict: refuse keys given twice, NaN, infinity and lone surrogates too. Without it, for data
            that others wrote, the last of equal keys counts, and whoever uses a value checks it.
            The bounds stay.

    Raises:
        ConfigError: naming `origin`, whatever is wrong with the text.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(items)
        if len(mapping) < len(items):
            raise ConfigError(f"key given twice: {', '.join(_repeated([k for k, _ in items]))}.")
        return mapping

    def constant(name: str) -> Any:
        raise ConfigError(f"{name} is not a finite number.")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(f"{digits[:20]}…")

    checks: dict[str, Any] = (
        {"object_pairs_hook": pairs, "parse_constant": constant, "parse_float": number}
        if strict
        else {}
    )
    try:
        if text.count("[") + text.count("{") > MAX_PARTS:
            raise ConfigError(f"more than {MAX_PARTS:,} lists and mappings; split it.")
        document = json.loads(text, parse_int=_whole_number, **checks)
        _require_shallow(document)
        if strict and _SURROGATE.search(text):
            _require_characters(document)
        return document
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: {_TOO_DEEP}") from error
    except ValueError as error:
        raise ConfigError(f"{origin} is not valid JSON: {error}") from error


def json_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` of a longer text, and where it ends.

    It is read as `parse_json` does without `strict`; the caller bounds its length.

    Raises:
        json.JSONDecodeError: there is no whole value.
        ConfigError: it is nested too deep, or holds a number that is too long.
    """
    try:
        value, end = _VALUES.raw_decode(text, start)
    except RecursionError as error:
        raise ConfigError(_TOO_DEEP) from error
    _require_shallow(value)
    return value, end


def read_json(
    path: Path | str, kind: type[VQGuardError], most: int = MAX_DOCUMENT, *, strict: bool = True
) -> Any:
    """The document in a regular file of at most `most` bytes, as `parse_json` reads it.

    Raises:
        VQGuardError: of the class `kind`, naming the file.
    """
    text = read_text(path, most, kind)
    try:
        return parse_json(text, str(path), strict=strict)
    except ConfigError as error:
        raise kind(f"cannot read {error}; restore it from a copy or write it again") from error


def read_yaml(path: Path | str) -> Any:
    """The document in a regular YAML file.

    Raises:
        ConfigError: naming the file.
    """
    return parse_yaml(read_text(path, 4 * MAX_YAML, ConfigError), str(path))


def _repeated(keys: list[Any]) -> list[str]:
    seen: set[Any] = set()
    twice: set[Any] = set()
    for key in keys:
        (twice if key in seen else seen).add(key)
    return sorted(map(str, twice))


def _whole_number(digits: str) -> int:
    _check_digits(digits)
    return int(digits)


_VALUES = json.JSONDecoder(parse_int=_whole_number)


def _check_digits(text: str) -> None:
    if len(text) > MAX_DIGITS:
        raise ConfigError(
            f"the number {text[:10]}… has {len(text):,} characters; whole numbers have at most"
            f" {MAX_DIGITS}"
        )


def _require_shallow(document: Any) -> None:
    """Refuse a document that is nested deeper than `MAX_DEPTH`."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            part
            for parent in level
            for part in (parent.values() if type(parent) is dict else parent)
            if type(part) is dict or type(part) is list
        ]
        if not level:
            return
    raise ConfigError(_TOO_DEEP)


def _require_characters(value: Any) -> None:
    """Refuse a text with a lone surrogate, which no file can hold."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{value[:40]!r} holds half a character; write it in UTF-8"
            ) from error
    elif isinstance(value, dict):
        for key, part in value.items():
            _require_characters(key)
            _require_characters(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            _require_characters(part)
