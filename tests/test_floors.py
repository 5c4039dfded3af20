"""Who may import whom: cli -> recipes -> adapters -> vqguard, never back up; nor up a folder's
levels, which `floors.yaml` writes down; nor in a circle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import yaml

from .import_graph import (
    File,
    circle,
    edges,
    imports,
    imports_in_functions,
    is_lazy_surface,
    read_files,
    targets,
)
from .layout import PACKAGES, ROOT

FLOORS = ["vqguard", "adapters", "recipes", "cli"]  # from below
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
LEVELS: dict[str, list[list[str]]] = yaml.safe_load(
    (ROOT / "tests" / "floors.yaml").read_text(encoding="utf-8")
)
MOST_FILES = 20  # in a folder
MOST_LEVELS = 11  # in a folder
MOST_IN_FUNCTIONS = 15  # imports inside functions, outside cli
OTHERS = "*"  # in a level: whatever else is in the folder
INIT = "__init__"  # in a level: the folder's own file
FILES = read_files()


def floor_of(module: str) -> str:
    """The floor that a module of the project belongs to."""
    return next(
        folder
        for folder in reversed(FLOORS)
        if module == PACKAGES[folder] or module.startswith(PACKAGES[folder] + ".")
    )


def rooms() -> dict[str, set[str]]:
    """For each folder of the project its files and folders, without `__init__.py`."""
    inside: dict[str, set[str]] = {}
    for module, file in FILES.items():
        if file.is_package:
            inside.setdefault(module, set())
        parent, _, name = module.rpartition(".")
        if parent and module not in PACKAGES.values():
            inside.setdefault(parent, set()).add(name)
    return inside


ROOMS = rooms()


def folder_of(package: str) -> str:
    """A package's key in `floors.yaml`."""
    folder = floor_of(package)
    return folder + package[len(PACKAGES[folder]) :].replace(".", "/")


def level(package: str, room: str) -> int | None:
    """How high a room stands in its folder; none where the folder has no level for it."""
    groups = LEVELS.get(folder_of(package), [])
    for wanted in (room, OTHERS):
        for height, names in enumerate(groups):
            if wanted in names:
                return height
        if room == INIT:
            return len(groups)
    return None


def is_above(floor: str, other: str) -> bool:
    return FLOORS.index(floor) > FLOORS.index(other)


def runs_up(module: str, target: str) -> str | None:
    """What is wrong with a module that imports another, if anything."""
    floor, owner = floor_of(module), floor_of(target)
    if owner != floor:
        return f"belongs to the floor {owner}" if is_above(owner, floor) else None
    package = PACKAGES[floor]
    ours, theirs = ((name[len(package) + 1 :] or INIT).split(".") for name in (module, target))
    while ours[0] == theirs[0]:
        package = f"{package}.{ours[0]}"
        ours, theirs = ours[1:] or [INIT], theirs[1:] or [INIT]
    height, other = level(package, ours[0]), level(package, theirs[0])
    if height is not None and other is not None and other >= height:
        return f"stands no lower in {folder_of(package)} (tests/floors.yaml)"
    return None


def problems_of(files: Mapping[str, File], module: str) -> Iterator[str]:
    """Imports of a module that the floors and the levels do not allow."""
    for name in imports(files[module]):
        top = name.module.partition(".")[0]
        if top in FLOORS[1:]:
            yield f"{top}: import vqguard.{top}, a plain import makes a second registry"
        elif top in OWNED and is_above(OWNED[top], floor_of(module)):
            yield f"line {name.line}: {top} belongs to the floor {OWNED[top]}"
        path = name.module if name.name is None else f"{name.module}.{name.name}"
        if path in files and is_lazy_surface(files[path]):
            yield f"line {name.line}: {path} is a lazy surface: import the names that are used"
    for target, line in targets(module, files).items():
        if problem := runs_up(module, target):
            yield f"line {line}: {target} {problem}"


def with_file(module: str, source: str, files: Mapping[str, File] = FILES) -> dict[str, File]:
    """The project's files, one of them with another content."""
    return {**files, module: replace(FILES[module], source=source)}


@pytest.mark.parametrize("module", FILES)
def test_no_file_imports_from_above(module: str) -> None:
    assert list(problems_of(FILES, module)) == []


def test_no_circle() -> None:
    assert circle(edges(FILES)) == []


@pytest.mark.parametrize("package", ROOMS)
def test_each_room_of_a_folder_has_its_level(package: str) -> None:
    names = [name for group in LEVELS[folder_of(package)] for name in group]
    assert len(names) == len(set(names)), "a name twice"
    assert set(names) - {OTHERS, INIT} <= ROOMS[package], "no such file or folder"
    assert OTHERS in names or ROOMS[package] <= set(names), "a room without a level"


def test_levels_are_written_for_folders_that_exist() -> None:
    assert set(LEVELS) == {folder_of(package) for package in ROOMS}


@pytest.mark.parametrize("package", ROOMS)
def test_a_folder_is_no_warehouse(package: str) -> None:
    files = [name for name in ROOMS[package] if f"{package}.{name}" not in ROOMS]
    assert len(files) + 1 <= MOST_FILES, "with __init__.py"
    # Imports run down the levels, so none of their chains is longer.
    assert len(LEVELS[folder_of(package)]) <= MOST_LEVELS


def test_imports_in_functions_are_few_and_say_why() -> None:
    hidden = [
        (module, statement)
        for module, file in FILES.items()
        if floor_of(module) != "cli"
        for statement in imports_in_functions(file)
    ]
    assert [
        f"{module}, line {statement.line}: {statement.text}"
        for module, statement in hidden
        if not statement.explained
    ] == []
    imported = [statement for _, statement in hidden if "import_module" not in statement.text]
    assert len(imported) <= MOST_IN_FUNCTIONS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vqguard.guard", "from vqguard.adapters import guard_model"),
        ("vqguard.guard", "def f():\n    import transformers"),
        ("vqguard.guard", "from . import adapters"),
        ("vqguard.guard", "import_module('vqguard.recipes.recipe')"),
        ("vqguard.search.dense", "from ..recipes.tiny import model"),
        ("vqguard.guard", "if TYPE_CHECKING:\n    from vqguard.recipes import recipe"),
        ("vqguard.adapters.families.llava", "from vqguard import recipes"),
        ("vqguard.recipes.tiny.model", "import vqguard.cli.main"),
        ("vqguard.recipes.training.stage1", "from rich.table import Table"),
        ("vqguard.cli.main", "import adapters"),
        ("vqguard.cli.main", "import vqguard"),
        # inside a folder: from a room below, a file's own folder, through a lazy surface
        ("vqguard.config", "from vqguard.guard import VQGuard"),
        ("vqguard.config", "from .guard import VQGuard"),
        ("vqguard.config", "def f():\n    from vqguard import guard"),
        ("vqguard.intervals", "from vqguard.distributed import shared"),  # of its own level
        ("vqguard.config", "from vqguard import VQGuard"),
        ("vqguard.search.base", "from . import make_search"),
        ("vqguard.search.base", "from vqguard.guard import VQGuard"),
        ("vqguard.adapters.storage.manifest", "from vqguard.adapters import guard_model"),
        ("vqguard.recipes.data.samples", "from ..training.stage1 import train_stage1"),
        ("vqguard.cli.output", "from vqguard.cli import main"),
    ],
)
def test_the_check_finds_what_it_looks_for(module: str, source: str) -> None:
    assert list(problems_of(with_file(module, source), module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vqguard.cli.main", "from vqguard.recipes import recipe\nimport transformers, click"),
        ("vqguard.adapters.families.llava", "from vqguard.guard import VQGuard"),
        ("vqguard.adapters.families.llava", "from ..base import Adapter"),
        ("vqguard.guard", "from .search import make_search\nimport torch"),
        ("vqguard.guard", "from vqguard import __version__, GuardConfig"),
    ],
)
def test_the_check_allows_what_is_allowed(module: str, source: str) -> None:
    assert list(problems_of(with_file(module, source), module)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from vqguard.guard import VQGuard",
        "def f():\n    from .. import guard",
        "if TYPE_CHECKING:\n    from vqguard import VQGuard",
        "lambda: import_module('vqguard.guard')",
    ],
)
def test_a_circle_is_found(source: str) -> None:
    found = circle(edges(with_file("vqguard.codebooks.codebook", source)))
    assert {"vqguard.codebooks.codebook", "vqguard.guard"} <= set(found)
    assert found[0] == found[-1]


def test_a_package_that_runs_on_import_is_a_part_of_circles() -> None:
    """Importing a module of `search` runs its `__init__.py`, and what that imports."""
    files = with_file("vqguard.search", "import vqguard.search.tuning")
    files = with_file("vqguard.search.tuning", "import vqguard.config", files)
    assert circle(edges(with_file("vqguard.config", "", files))) == []
    around = circle(edges(with_file("vqguard.config", "import vqguard.search.base", files)))
    assert {"vqguard.config", "vqguard.search", "vqguard.search.tuning"} == set(around)


@pytest.mark.parametrize(
    ("source", "explained"),
    [
        ("def f():\n    import faiss", [False]),
        ("def f():\n    import faiss  # slow", [True]),
        ("def f():\n    import faiss  # noqa", [False]),
        ("def f():\n    # slow\n    import faiss", [True]),
        ("def f():\n    # slow\n    import faiss\n    from a import b", [True, True]),
        ("def f():\n    # slow\n    import faiss\n    f()\n    import b", [True, False]),
        ("def f():\n    f()  # slow\n    import faiss", [False]),
        ("class A:\n    async def f(self):\n        import_module('faiss')", [False]),
        ("import faiss\nif TYPE_CHECKING:\n    import torch", []),
    ],
)
def test_an_import_in_a_function_says_why(source: str, explained: list[bool]) -> None:
    file = File("vqguard.made_up", source, is_package=False)
    assert [statement.explained for statement in imports_in_functions(file)] == explained
