"""Configurations and files that refuse what they do not know.

`StrictData` gives frozen dataclasses (nested ones too) a strict reading from mappings, by pydantic;
`StrictConfig` is read from YAML and JSON files as well. All problems of a file are collected and
shown together, each with the nearest valid name.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar, Union

import yaml
from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticKnownError, core_schema, to_jsonable_python

from vqguard.errors import ConfigError
from vqguard.files import replace_text
from vqguard.names import nearest
from vqguard.text_files import parse_yaml, read_json, read_yaml

D = TypeVar("D", bound="StrictData")
C = TypeVar("C", bound="StrictConfig")

_LISTED = 100
"""Problems that are shown: a file from elsewhere may have one in each of its numbers."""


class Must(NamedTuple):
    """Beside a type in `Annotated`: what is said of a value that is not of it, after its name.

    Example: ``Annotated[int, Ge(1), Must("must be a positive integer")]``.
    """

    text: str


class _Checked(type):
    """Makes instances of a dataclass through pydantic."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _validated(cls, dict(cls.__signature__.bind(*args, **kwargs).arguments))

    @property
    def __signature__(cls) -> inspect.Signature:
        """The fields: what this metaclass is called with says nothing."""
        makes: Any = type.__getattribute__(cls, "__init__")
        shown = inspect.signature(makes)
        return shown.replace(parameters=list(shown.parameters.values())[1:])


class StrictData(metaclass=_Checked):
    """Mixin for frozen dataclasses: values of other types and unknown keys are refused.

    Field types may be whatever pydantic knows. Nothing is guessed: an int is accepted for a float,
    a bool never for an int, and NaN or infinity nowhere; only what YAML and JSON cannot say is
    converted, a list to a tuple and a text to a Path. A subclass that validates ranges overrides
    `__post_init__`, calls `super().__post_init__()` and raises ConfigError.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
    }

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return _as_read(handler(source))

    def __post_init__(self) -> None:
        """Fields have their types here."""

    @classmethod
    def from_dict(cls: type[D], data: Any) -> D:
        """Build from a plain mapping. Raises ConfigError that lists every problem found."""
        plain = dict(data) if isinstance(data, Mapping) else data
        return typing.cast(D, _validated(cls, plain))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (dict, list, str, int, float, bool, None): ready for JSON or YAML."""
        return typing.cast("dict[str, Any]", to_jsonable_python(self))

    @classmethod
    def _refuse(cls, data: Any, problems: list[str]) -> NoReturn:
        """Raise what a subclass raises where `data` has `problems`."""
        raise _listing(cls, problems)


class StrictConfig(StrictData):
    """Mixin for frozen dataclasses: strict reading, writing and overriding."""

    @classmethod
    def from_yaml(cls: type[C], path: str | Path) -> C:
        """Read a YAML file. Raises ConfigError naming the file."""
        return cls._named(path, read_yaml(path))

    @classmethod
    def from_json(cls: type[C], path: str | Path) -> C:
        """Read a JSON file. Raises ConfigError naming the file."""
        return cls._named(path, read_json(path, ConfigError))

    @classmethod
    def _named(cls: type[C], path: str | Path, data: Any) -> C:
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


def raise_problems(cls: type, problems: list[str]) -> None:
    """Raise ConfigError that lists the problems, if there are any."""
    if problems:
        raise _listing(cls, problems)


def _listing(cls: type, problems: list[str]) -> ConfigError:
    listed = "".join(f"\n  - {problem}" for problem in problems)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return ConfigError(f"{cls.__name__.lstrip('_')}: {count}{listed}", tuple(problems))


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def _as_read(schema: Any) -> Any:
    """Let a list stand for a tuple, a text for a Path, a mapping for a dataclass, where found."""
    if isinstance(schema, dict):
        for part in schema.values():
            _as_read(part)
        if schema.get("type") in ("tuple", "list", "dict", "dataclass", "lax-or-strict"):
            schema["strict"] = False
        if schema.get("type") in ("tuple", "list"):
            ordered = core_schema.no_info_before_validator_function(_in_order, {**schema})
            schema.clear()
            schema.update(ordered)
    elif isinstance(schema, list):
        for part in schema:
            _as_read(part)
    return schema


def _in_order(value: Any) -> Any:
    """Pydantic takes sets for lists, in whatever order."""
    if not isinstance(value, list | tuple):
        raise PydanticKnownError("list_type")
    return value


def _validated(cls: Any, data: Any) -> Any:
    try:
        return _adapter(cls).validate_python(data)
    except ValidationError as error:
        problems = (
            text
            for item in error.errors(include_url=False)[:_LISTED]
            for text in _problems(cls, item)
        )
        listed = list(dict.fromkeys(problems))  # a union names each of its members
        if error.error_count() > _LISTED:
            listed.append(f"{error.error_count() - _LISTED:,} more of them: correct these first")
    return cls._refuse(data, listed)


def _problems(cls: type, error: ErrorDetails) -> list[str]:
    """The problem that pydantic found, in the words of this project."""
    steps = error["loc"]
    short = error["type"] == "missing" and isinstance(steps[-1], int)  # of a tuple
    path, kind, rest = _walk(cls, steps[:-1] if short else steps)
    value = error["input"]
    if error["type"] == "value_error":  # of __post_init__, or of a field's own check
        raised = error["ctx"]["error"]
        prefix = f"{path}{'.' if _config_in(kind) else ': '}" if path else ""
        return [prefix + text for text in getattr(raised, "problems", ()) or (str(raised),)]
    if error["type"] == "unexpected_keyword_argument":
        key = ".".join(filter(None, (path, str(rest[0]))))
        return [f"{key}: unknown key.{nearest(str(rest[0]), _hints(_config_in(kind) or cls))}"]
    if error["type"] == "missing" and not short:
        return [f"{path}: missing key {steps[-1]!r}; expected {_named(kind)}"]
    if said := _must(cls, steps):
        return [f"{said}, got {_shown(value)}"]
    if error["type"] == "dataclass_type" and isinstance(kind, _Checked):
        where = path or "the configuration"
        return [f"{where}: expected a mapping of keys, got {_shown(value)}"]
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        hint = nearest(value, [str(option) for option in typing.get_args(_bare(kind))])
    return [f"{path}: expected {_named(kind)}, got {_shown(value)}.{hint}"]


def _must(cls: type, steps: tuple[str | int, ...]) -> str | None:
    """What the innermost `Must` around a location says."""
    for end in range(len(steps), 0, -1):
        path, kind, _ = _walk(cls, steps[:end])
        for note in getattr(kind, "__metadata__", ()):
            if isinstance(note, Must):
                return f"{path} {note.text}"
    return None


def _walk(cls: type, steps: tuple[str | int, ...]) -> tuple[str, Any, tuple[str | int, ...]]:
    """Where pydantic's location leads: as a path, the type there, and the steps not taken."""
    path, kind = "", typing.cast(Any, cls)
    for place, step in enumerate(steps):
        inner = _only(kind)
        parts, config = typing.get_args(inner), _config_in(inner)
        if config is not None and step in _hints(config):
            path, kind = f"{path}.{step}".lstrip("."), _hints(config)[str(step)]
        elif typing.get_origin(inner) in (dict, Mapping):
            if steps[place + 1 : place + 2] == ("[key]",):
                return f"{path} keys", parts[0], ()
            path, kind = f"{path} {step!r}", parts[1]
        elif typing.get_origin(inner) is list or parts[1:] == (Ellipsis,):
            path, kind = f"{path}[{step}]", parts[0]
        elif typing.get_origin(inner) is tuple and isinstance(step, int) and step < len(parts):
            path, kind = f"{path}[{step}]", parts[step]
        else:
            return path, kind, steps[place:]
    return path, kind, ()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _bare(kind: Any) -> Any:
    """The type without what `Annotated` says of it."""
    return kind.__origin__ if typing.get_origin(kind) is Annotated else kind


def _only(kind: Any) -> Any:
    """The type beside None, where there is but one."""
    kind = _bare(kind)
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    union = typing.get_origin(kind) in (Union, types.UnionType)
    return _bare(parts[0]) if union and len(parts) == 1 else kind


def _config_in(kind: Any) -> type[StrictData] | None:
    inner = _only(kind)
    config = isinstance(inner, type) and issubclass(inner, StrictData)
    return typing.cast("type[StrictData]", inner) if config else None


def _assign(
    cls: type[StrictData], data: dict[str, Any], key: str, value: Any, problems: list[str]
) -> None:
    head, dot, rest = key.partition(".")
    hints = _hints(cls)
    if head not in hints:
        problems.append(f"{key}: unknown key.{nearest(head, hints)}")
        return
    if not dot:
        data[head] = value
        return
    nested = _config_in(hints[head])
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
    kind = _bare(kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(option) for option in arguments)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_named(member) for member in arguments)
    if kind is type(None):
        return "null"
    if kind is float:
        return "float (finite)"
    return kind.__name__ if isinstance(kind, type) and not arguments else str(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
