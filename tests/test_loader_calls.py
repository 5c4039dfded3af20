"""Every call in the product that loads something of somebody else's runs nothing of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("adapters", "recipes", "cli", "vqguard")
# Objects of transformers and PEFT whose methods read what a folder or a hub holds.
LOADING = {"from_pretrained", "from_config"}
# Ours, or readers of nothing but one JSON file, or of LoRA weights that were checked before.
HARMLESS = {"VQGuard", "cls", "GenerationConfig", "PeftModel", "processor_class"}


def calls() -> list[tuple[str, ast.Call, str]]:
    """(where, call, whose method) of all calls of the loading methods, aliases of them included."""
    found = []
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            names = {"load"} if "load: Any = AutoModel" in path.read_text() else set()
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                function = node.func
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                if isinstance(function, ast.Attribute) and function.attr in LOADING:
                    found.append((place, node, ast.unparse(function.value)))
                elif isinstance(function, ast.Name) and function.id in names:
                    found.append((place, node, function.id))
    return found


CALLS = calls()


def test_processes_are_started_by_the_one_way_that_runs_no_module_of_the_working_directory() -> (
    None
):
    starting = [
        path.relative_to(ROOT).as_posix()
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        if "sys.executable" in path.read_text()
    ]
    assert starting == ["recipes/processes.py"]


def test_the_search_sees_them() -> None:
    assert len(CALLS) >= 14
    assert {"recipes", "adapters", "cli"} <= {place.split("/")[0] for place, _, _ in CALLS}


@pytest.mark.parametrize(("place", "call", "owner"), CALLS, ids=[place for place, _, _ in CALLS])
def test_a_loading_call_runs_nothing_that_it_loads(place: str, call: ast.Call, owner: str) -> None:
    if owner in HARMLESS and "storage/guard_only.py" not in place:
        return
    if owner in ("GenerationConfig", "marked", "original"):
        return
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert given.get("trust_remote_code") == "False", (place, ast.unparse(call))
    model = "Model" in owner or owner in ("load", "cls", "kind_of_model")
    if model and "from_config" not in ast.unparse(call.func):
        assert given.get("use_safetensors") == "True", (place, ast.unparse(call))
