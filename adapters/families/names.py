"""The public names in the files of the families, read without running them.

A family's file imports torch, and listing names must be instant. So `checkpoints={...}` of each
`Family(...)` is read from the file's syntax tree, as setuptools reads a package's version.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import TypeGuard

from vqguard.adapters.families import FAMILIES
from vqguard.errors import ConfigError


@cache
def checkpoints() -> tuple[tuple[str, str, str], ...]:
    """(name, `config.model_type`, id on the hub) of all families, in the order of the list."""
    return tuple(row for module in FAMILIES for row in read_checkpoints(_source(module), module))


def read_checkpoints(source: str, module: str) -> Iterator[tuple[str, str, str]]:
    """The same of one file.

    Raises:
        ConfigError: where they are no literals.
    """
    if "checkpoints=" not in source:
        return
    for family in _declared(ast.parse(source)):
        named = {keyword.arg: keyword.value for keyword in family.keywords}
        if "checkpoints" not in named:
            continue
        try:
            model_type = ast.literal_eval(family.args[0])
            places = ast.literal_eval(named["checkpoints"])
        except (IndexError, ValueError) as error:
            raise ConfigError(
                f"{module}, line {family.lineno}: expected a Family whose model type and "
                "checkpoints are literals, since names are listed without running the file"
            ) from error
        for name, place in places.items():
            yield name, model_type, place


def _declared(tree: ast.Module) -> Iterator[ast.Call]:
    """Every `Family(...)` that a statement or a class decorator of the file is called with."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            calls: list[ast.expr] = statement.decorator_list
        elif isinstance(statement, ast.Expr):
            calls = [statement.value]
        else:
            continue
        for call in calls:
            if isinstance(call, ast.Call):
                yield from (argument for argument in call.args if _is_family(argument))


def _is_family(node: ast.expr) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Family"
    )


def _source(module: str) -> str:
    folder, _, name = f"vqguard.adapters.families.{module}".rpartition(".")
    data = pkgutil.get_data(folder, f"{name}.py")
    if data is None:
        raise ConfigError(f"no source of the family {module}: expected {name}.py in {folder}")
    return data.decode("utf-8")
