"""The import graph of the project, read from its sources without running them.

Every import counts, wherever it stands: inside functions, under `TYPE_CHECKING`, relative ones, and
`import_module` of a name that is written out. `from package import name` leads to the submodule of
that name if there is one. A *lazy surface*, an `__init__.py` with a `__getattr__`, runs none of the
modules that it names, so it imports nothing here; a name imported from it leads to its home.
"""

from __future__ import annotations

import ast
import graphlib
import io
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .layout import PACKAGES, ROOT, module_of

NO_REASON = ("noqa", "type:", "pragma", "fmt:")  # comments for tools


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` where there is none."""

    module: str
    name: str | None
    line: int


@dataclass(frozen=True)
class Statement:
    """An import that stands in a function, and whether a comment says why it does."""

    line: int
    text: str
    explained: bool


@dataclass(frozen=True)
class File:
    """A source file: its module's name, its text, and whether it is an `__init__.py`."""

    module: str
    source: str
    is_package: bool


def read_files() -> dict[str, File]:
    """All files of the project, by the name they are imported as."""
    return {
        module_of(path): File(
            module_of(path), path.read_text(encoding="utf-8"), path.name == "__init__.py"
        )
        for folder in PACKAGES
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


@cache
def is_lazy_surface(file: File) -> bool:
    if not file.is_package:
        return False
    defined = {
        name.id if isinstance(name, ast.Name) else name.name
        for statement in _tree(file.source).body
        for name in ast.walk(statement)
        if isinstance(name, ast.FunctionDef)
        or (isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))
    }
    return "__getattr__" in defined


def _written_out(node: ast.AST) -> str | None:
    """The module of `import_module("...")`."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    called = ast.unparse(node.func)
    first = node.args[0]
    if called.rpartition(".")[2] in ("import_module", "__import__") and isinstance(
        first, ast.Constant
    ):
        return str(first.value)
    return None


def _imports_at(node: ast.AST, package: list[str]) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, None, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        yield from (Import(module, alias.name, node.lineno) for alias in node.names)
    elif (module_name := _written_out(node)) is not None:
        yield Import(module_name, None, getattr(node, "lineno", 0))


@cache
def imports(file: File) -> tuple[Import, ...]:
    """All imports of a file, but for those of a lazy surface that only type checkers follow."""
    package = file.module.split(".")[: None if file.is_package else -1]
    surface = is_lazy_surface(file)
    names: list[Import] = []
    pending: list[ast.AST] = [_tree(file.source)]
    while pending:
        node = pending.pop()
        if surface and _is_type_checking(node):
            continue
        pending.extend(ast.iter_child_nodes(node))
        names.extend(_imports_at(node, package))
    return tuple(sorted(names, key=lambda name: name.line))


@cache
def _homes(surface: File) -> Mapping[str, Import]:
    """Where a lazy surface's names come from, as it tells type checkers."""
    package = surface.module.split(".")
    return {
        name.name: name
        for statement in _tree(surface.source).body
        if _is_type_checking(statement)
        for node in ast.walk(statement)
        for name in _imports_at(node, package)
        if name.name is not None
    }


def resolve(name: Import, files: Mapping[str, File]) -> str | None:
    """The module of the project that an import leads to; none for those of others.

    The name of a surface is given where what it holds is not a module's.
    """
    if name.name is not None and f"{name.module}.{name.name}" in files:
        return f"{name.module}.{name.name}"
    file = files.get(name.module)
    if file is None:
        parent = name.module.rpartition(".")[0]
        return resolve(Import(parent, None, name.line), files) if parent else None
    if name.name is not None and is_lazy_surface(file):
        home = _homes(file).get(name.name)
        return file.module if home is None else resolve(home, files)
    return file.module


def _runs(target: str, module: str) -> Iterator[str]:
    """What runs when a module imports another: that, and those of its packages that do not run
    already, because they are the importing module's own.
    """
    yield target
    while (target := target.rpartition(".")[0]) and not f"{module}.".startswith(f"{target}."):
        yield target


def targets(module: str, files: Mapping[str, File]) -> dict[str, int]:
    """The modules of the project that a module imports, with the line.

    Lazy surfaces lead nowhere, so nothing leads to them.
    """
    lines: dict[str, int] = {}
    for name in imports(files[module]):
        target = resolve(name, files)
        for ran in _runs(target, module) if target is not None else ():
            if ran != module and not is_lazy_surface(files[ran]):
                lines.setdefault(ran, name.line)
    return lines


def edges(files: Mapping[str, File]) -> dict[str, dict[str, int]]:
    """The whole graph: `targets` of each module."""
    return {module: targets(module, files) for module in files}


def circle(graph: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; or none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # An edge of the sorter leads to what comes before, so the circle is told backwards.
        return list(reversed(error.args[1]))
    return []


@cache
def imports_in_functions(file: File) -> tuple[Statement, ...]:
    """Imports inside functions. One comment may explain those that follow each other."""
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(file.source).readline)
        if token.type == tokenize.COMMENT
    }
    says_why = {
        line: alone for line, (text, alone) in comments.items() if not text.startswith(NO_REASON)
    }
    statements: dict[int, Statement] = {}
    for function in ast.walk(_tree(file.source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        explained_until = 0
        nodes = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom) or _written_out(node) is not None
        ]
        for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
            first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
            explained = (
                says_why.get(first - 1, False)
                or any(line in says_why for line in range(first, last + 1))
                or explained_until == first - 1
            )
            if explained:
                explained_until = last
            statements[first] = Statement(first, ast.unparse(node), explained)
    return tuple(statements[line] for line in sorted(statements))
