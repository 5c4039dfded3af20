"""Adapters of other packages: by entry point, and by a module's name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqguard import verdict_rules
from vqguard.adapters import get_adapter, plugins, registry
from vqguard.adapters.families import registration
from vqguard.adapters.registry import adapter_for_type, is_known_type
from vqguard.errors import InputError, SeamError
from vqguard.recipes.extensions import import_extension

GOOD = """
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.registration import register_adapter


@register_adapter("their_type", "their_other_type")
class TheirAdapter(DefaultAdapter):
    pass
"""
Write = Callable[[str, str], str]


RULE = """
from vqguard import register_verdict_rule
from vqguard.verdict_rules import AnyToxic


class TheirRule(AnyToxic):
    pass


register_verdict_rule("their rule", TheirRule())
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a module that can be imported; what it registers is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_ADAPTERS", dict(registry.registered()))
    monkeypatch.setattr(registration, "_FAMILIES", dict(registration.family_table()))
    before = set(sys.modules)

    def make(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    def declare(*found: tuple[str, str]) -> None:
        def entry_points(*, group: str, name: str) -> list[EntryPoint]:
            assert group == "vqguard.adapters"
            return [EntryPoint(n, value, group) for n, value in found if n == name]

        monkeypatch.setattr(plugins, "entry_points", entry_points)

    make.declare = declare  # type: ignore[attr-defined]
    yield make
    for name in set(sys.modules) - before:
        if name.startswith("theirs_"):
            del sys.modules[name]


def test_a_module_by_its_name(write: Write) -> None:
    module = write("theirs_good", GOOD)
    assert import_extension(module) == ("their_other_type", "their_type")
    assert type(adapter_for_type("their_type")).__module__ == module
    # A second time nothing is new, and it is the same answer.
    assert import_extension(module) == ("their_other_type", "their_type")


def test_a_module_may_register_a_verdict_rule_alone(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_rules, "_RULES", dict(verdict_rules._RULES))
    module = write("theirs_rule", RULE)
    assert import_extension(module) == ()
    assert import_extension(module) == ()
    assert verdict_rules.verdict_rule("their rule") is not None


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("theirs_nothing", "x = 1\n", "registers no adapter"),
        ("theirs_idle", "from vqguard.recipes.training.engines import Replicated\n", "no adapter"),
        ("theirs_broken", "import no_such_package_of_theirs\n", "cannot be imported: ModuleNot"),
        ("theirs_raising", "raise RuntimeError('out of order')\n", "RuntimeError: out of order"),
    ],
)
def test_a_module_that_is_of_no_use(write: Write, name: str, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        import_extension(write(name, text))


@pytest.mark.parametrize("name", ["theirs_missing", "theirs_missing.inside", "json.no_such_part"])
def test_a_module_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=rf"no module '{name}'.*PYTHONPATH"):
        import_extension(name)


@pytest.mark.parametrize("name", ["", "./theirs.py", "theirs-good", "a..b"])
def test_what_is_no_name_of_a_module(name: str) -> None:
    with pytest.raises(InputError, match="dotted name"):
        import_extension(name)


def test_a_module_for_a_type_that_has_an_adapter(write: Write) -> None:
    with pytest.raises(SeamError, match="'llava' already has the adapter"):
        import_extension(write("theirs_llava", GOOD.replace("their_type", "llava")))


def test_an_entry_point_is_imported_when_its_type_is_met(write: Any) -> None:
    module = write("theirs_installed", GOOD)
    write.declare(("their_type", module), ("untouched", "theirs_untouched"))
    adapter_for_type("llava")
    assert module not in sys.modules
    model = SimpleNamespace(config=SimpleNamespace(model_type="their_type"))
    assert type(get_adapter(model)).__name__ == "TheirAdapter"
    assert is_known_type("their_type")
    assert "theirs_untouched" not in sys.modules


def test_a_type_that_the_project_knows_is_not_taken_over(write: Any) -> None:
    write.declare(("llava", "theirs_absent"))
    assert type(adapter_for_type("llava")).__name__ == "LlavaAdapter"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([("their_type", "theirs_absent")], "cannot be imported.*ModuleNotFoundError"),
        ([("their_type", "theirs_empty")], r"expected register_adapter\('their_type'\) there"),
        ([("their_type", "theirs_empty"), ("their_type", "theirs_x:y")], "several installed"),
    ],
)
def test_a_bad_entry_point_is_an_error(write: Any, found: Any, said: str) -> None:
    write("theirs_empty", "")
    write.declare(*found)
    with pytest.raises(SeamError, match=said):
        get_adapter(SimpleNamespace(config=SimpleNamespace(model_type="their_type")))


def test_the_same_entry_point_twice_is_one(write: Any) -> None:
    """An editable install is found next to the one that it replaced."""
    module = write("theirs_twice", GOOD)
    write.declare(("their_type", module), ("their_type", module))
    assert adapter_for_type("their_type") is not None
