"""Who may import whom: cli -> recipes -> adapters -> vqguard, never back up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["vqguard", "adapters", "recipes", "cli"]  # from below
PACKAGES = {folder: "vqguard" if folder == "vqguard" else f"vqguard.{folder}" for folder in FLOORS}
# third parties that a floor, and only those above it, may import
OWNED = {
    "transformers": "adapters",
    "timm": "adapters",
    "open_clip": "adapters",
    "peft": "adapters",
    "accelerate": "recipes",
    "matplotlib": "recipes",
    "jinja2": "recipes",
    "click": "cli",
    "rich": "cli",
}


def _files() -> list[Path]:
    return sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def _module(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "vqguard":
        parts.insert(0, "vqguard")
    return parts


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    package = _module(path) if path.name == "__init__.py" else _module(path)[:-1]
    package = [part for part in package if part != "__init__"]
    # the lazy surface names its parts for type checkers only; they run nothing
    surface = path == ROOT / "vqguard" / "__init__.py"
    pending = [tree]
    while pending:
        node = pending.pop()
        if surface and _is_type_checking(node):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> str | None:
    """The floor that owns a module of the project, or that may import a third party's."""
    for folder in reversed(FLOORS):
        if module == PACKAGES[folder] or module.startswith(PACKAGES[folder] + "."):
            return folder
    return None


def problems_of(path: Path, source: str) -> list[str]:
    """Imports in `source`, taken as the content of `path`, that the floors do not allow."""
    height = FLOORS.index(path.relative_to(ROOT).parts[0])
    found = []
    for module in imports(path, ast.parse(source)):
        top = module.partition(".")[0]
        if top in FLOORS[1:]:
            found.append(f"{module}: import vqguard.{top}, a plain import makes a second registry")
        owner = floor_of(module) or OWNED.get(top)
        if owner is not None and FLOORS.index(owner) > height:
            found.append(f"{module}: belongs to the floor {owner}")
    return found


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_from_a_floor_above(path: Path) -> None:
    assert problems_of(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("vqguard/guard.py", "from vqguard.adapters import guard_model"),
        ("vqguard/guard.py", "def f():\n    import transformers"),
        ("vqguard/guard.py", "from . import adapters"),
        ("vqguard/search/dense.py", "from ..recipes.tiny import model"),
        ("vqguard/guard.py", "if TYPE_CHECKING:\n    from vqguard.recipes import recipe"),
        ("adapters/families/llava.py", "from vqguard import recipes"),
        ("recipes/tiny/model.py", "import vqguard.cli.main"),
        ("recipes/training/stage1.py", "from rich.table import Table"),
        ("cli/main.py", "import adapters"),
    ],
)
def test_the_check_finds_what_it_looks_for(place: str, source: str) -> None:
    assert problems_of(ROOT / place, source)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("cli/main.py", "from vqguard.recipes import recipe\nimport transformers, click"),
        (
            "adapters/families/llava.py",
            "from vqguard.guard import VQGuard\nfrom .base import Adapter",
        ),
        ("vqguard/guard.py", "from .search import make_search\nimport torch"),
    ],
)
def test_the_check_allows_what_is_allowed(place: str, source: str) -> None:
    assert problems_of(ROOT / place, source) == []
