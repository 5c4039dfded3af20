"""Configurations that refuse what they do not know.

`StrictConfig` gives frozen dataclasses (nested ones too) a strict reading from mappings, YAML and
JSON. All problems of a file are collected and shown together, each with the nearest valid name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from vqguard.errors import ConfigError
from vqguard.files import replace_text
from vqguard.names import nearest
from vqguard.text_files import parse_json, parse_yaml

C = TypeVar("C", bound="StrictConfig")


class StrictConfig:
    """Mixin for frozen dataclasses: strict reading, writing and overriding.

    Field types may be bool, int, float, str, Path, Literal, Optional or other unions, tuple, list,
    dict and nested `StrictConfig` dataclasses. An int is accepted for a float, a bool never for an
    int, and NaN or infinity nowhere. A subclass that validates ranges overrides `__post_init__`,
    calls `super().__post_init__()` and raises ConfigError.
    """

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name, kind in _hints(type(self)).items():
            value = _convert(getattr(self, name), kind, name, problems)
            # an int given for a float becomes one, so that equal configs serialise equally
            object.__setattr__(self, name, value)
        raise_problems(type(self), problems)

    @classmethod
    def from_dict(cls: type[C], data: Mapping[str, Any]) -> C:
        """Build from a plain mapping. Raises ConfigError that lists every problem found."""
        problems: list[str] = []
        config = _build(cls, data, "", problems)
        raise_problems(cls, problems)
        return typing.cast(C, config)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (dict, list, str, int, float, bool, None): ready for JSON or YAML."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file. Raises ConfigError naming the file."""
        return cls._from_text(path, parse_yaml)

    @classmethod
    def from_json(cls: type[C], path: str | Path) -> C:
        """Read a JSON file. Raises ConfigError naming the file."""
        return cls._from_text(path, parse_json)

    @classmethod
    def _from_text(cls: type[C], path: str | Path, parse: Any) -> C:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        data = parse(text, str(path))
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}", error.problems) from error

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file, whole or not at all, that `from_yaml` reads back."""
        data = self.to_dict()
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        if yaml.safe_load(text) != data:
            # PyYAML does not quote U+0085 and its like in unicode, and reads them as line ends
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=False)
        replace_text(Path(path), text)

    def to_json(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all, that `from_json` reads back."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        replace_text(Path(path), text + "\n")

    def override(self: C, assignments: Iterable[str]) -> C:
        """Return a copy with `a.b=value` assignments applied; values are read as YAML.

        Example: ``config.override(["patch_codes=1024", "stage1.learning_rate=1e-3"])``.
        Raises ConfigError that lists every assignment which cannot be applied.
        """
        data = self.to_dict()
        problems: list[str] = []
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not key.strip():
                problems.append(f"{assignment!r}: expected key=value, for example patch_codes=1024")
                continue
            _assign(type(self), data, key.strip(), parse_yaml(text, assignment), problems)
        raise_problems(type(self), problems)
        return type(self).from_dict(data)

    @classmethod
    def field_docs(cls) -> dict[str, str]:
        """Text under each field in the class body, by field name (docs are generated from it)."""
        docs: dict[str, str] = {}
        for owner in reversed(cls.__mro__):
            if not dataclasses.is_dataclass(owner):
                continue
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
            statements = typing.cast(ast.ClassDef, body).body
            for field, text in itertools.pairwise(statements):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                ):
                    docs[field.target.id] = inspect.cleandoc(text.value.value)
        return docs


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def raise_problems(cls: type, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{cls.__name__}: {count}{listed}", tuple(problems))


def _plain(value: Any) -> Any:
    if isinstance(value, StrictConfig):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _build(cls: type[StrictConfig], data: Any, prefix: str, problems: list[str]) -> Any:
    where = prefix.rstrip(".") or "the configuration"
    if not isinstance(data, Mapping):
        problems.append(f"{where}: expected a mapping of keys, got {_shown(data)}")
        return None
    hints = _hints(cls)
    before = len(problems)
    for key in data:
        if key not in hints:
            problems.append(f"{prefix}{key}: unknown key.{nearest(str(key), hints)}")
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in data:
            path = prefix + field.name
            values[field.name] = _convert(data[field.name], hints[field.name], path, problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            expected = _named(hints[field.name])
            problems.append(f"{prefix}{field.name}: missing; expected {expected}")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        problems += [prefix + problem for problem in error.problems or (str(error),)]
        return None


def _convert(value: Any, kind: Any, path: str, problems: list[str]) -> Any:
    """Return `value` as `kind`, or note a problem."""
    before = len(problems)
    result = _try_convert(value, kind, path, problems)
    if result is _MISMATCH:
        if len(problems) == before:
            hint = ""
            if isinstance(value, str) and typing.get_origin(kind) is Literal:
                hint = nearest(value, [str(option) for option in typing.get_args(kind)])
            problems.append(f"{path}: expected {_named(kind)}, got {_shown(value)}.{hint}")
        return None
    return result


_MISMATCH = object()


def _try_convert(value: Any, kind: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(value, arguments, path, problems)
    if origin is Literal:
        matches = [o for o in arguments if o == value and type(o) is type(value)]
        return matches[0] if matches else _MISMATCH
    if origin in (tuple, list) or kind in (tuple, list):
        return _sequence(value, origin or kind, arguments, path, problems)
    if origin is dict or kind is dict:
        return _mapping(value, arguments or (str, Any), path, problems)
    if isinstance(kind, type) and issubclass(kind, StrictConfig):
        if isinstance(value, kind):
            return value
        return _build(kind, value, path + ".", problems)
    return _scalar(value, kind)


def _scalar(value: Any, kind: Any) -> Any:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) else _MISMATCH
    if kind is Path:
        return Path(value) if isinstance(value, str | Path) else _MISMATCH
    if kind in (int, bool, str, type(None)):
        return value if type(value) is kind else _MISMATCH
    raise TypeError(f"StrictConfig does not support fields of type {kind!r}")


def _union(value: Any, kinds: tuple[Any, ...], path: str, problems: list[str]) -> Any:
    nested: list[str] = []
    for kind in kinds:
        attempt: list[str] = []
        result = _try_convert(value, kind, path, attempt)
        if result is not _MISMATCH and not attempt:
            return result
        if isinstance(value, Mapping):
            nested += attempt
    problems += nested  # a mapping was meant for the nested config: say what is wrong inside it
    return _MISMATCH


def _sequence(
    value: Any, kind: type, arguments: tuple[Any, ...], path: str, problems: list[str]
) -> Any:
    if not isinstance(value, tuple | list):
        return _MISMATCH
    kinds: list[Any] = [Any] * len(value)
    if (kind is list and arguments) or arguments[1:] == (Ellipsis,):
        kinds = [arguments[0]] * len(value)
    elif arguments:
        if len(arguments) != len(value):
            return _MISMATCH
        kinds = list(arguments)
    items = [
        _convert(item, one, f"{path}[{place}]", problems)
        for place, (item, one) in enumerate(zip(value, kinds, strict=True))
    ]
    return kind(items)


def _mapping(value: Any, arguments: tuple[Any, ...], path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return _MISMATCH
    return {
        _convert(key, arguments[0], f"{path} key", problems): _convert(
            item, arguments[1], f"{path}.{key}", problems
        )
        for key, item in value.items()
    }


def _nested_config(kind: Any) -> type[StrictConfig] | None:
    for one in (kind, *typing.get_args(kind)):
        if isinstance(one, type) and issubclass(one, StrictConfig):
            return one
    return None


def _assign(
    cls: type[StrictConfig], data: dict[str, Any], key: str, value: Any, problems: list[str]
) -> None:
    head, dot, rest = key.partition(".")
    hints = _hints(cls)
    if head not in hints:
        problems.append(f"{key}: unknown key.{nearest(head, hints)}")
        return
    if not dot:
        data[head] = value
        return
    nested = _nested_config(hints[head])
    if nested is not None:
        if data.get(head) is None:
            data[head] = {}
        inner: list[str] = []
        _assign(nested, data[head], rest, value, inner)
        problems += [f"{head}.{problem}" for problem in inner]
    elif isinstance(data.get(head), dict):
        data[head][rest] = value
    else:
        problems.append(f"{key}: {head} has no parts; write {head}=value")


def _named(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_named(one) for one in arguments)
    if kind is type(None):
        return "null"
    if kind is float:
        return "float (finite)"
    return kind.__name__ if isinstance(kind, type) and not arguments else str(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
