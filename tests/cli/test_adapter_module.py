"""``--adapter-module``: adapters that live in the user's own package."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vqguard.adapters import registry
from vqguard.adapters.families import registration
from vqguard.cli.main import COMMANDS, main, program

MODULE = '''
"""A LLaVA under a name of its own, with its adapter."""

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vqguard.adapters.families.llava import LlavaAdapter
from vqguard.adapters.families.registration import register_adapter


class Config(LlavaConfig):
    model_type = "house_llava"


class Model(LlavaForConditionalGeneration):
    config_class = Config


AutoConfig.register("house_llava", Config, exist_ok=True)
AutoModelForImageTextToText.register(Config, Model, exist_ok=True)


@register_adapter("house_llava")
class HouseAdapter(LlavaAdapter):
    pass
'''
TAKING = (
    *(
        "verify",
        "retrofit",
        "scan",
        "ask",
        "calibrate",
        "evaluate",
        "export",
        "search-plan",
        "attack",
        "certify",
        "serve",
        "gateway",
    ),
    *("map show", "map diff", "map edit"),
)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "house_adapter.py").write_text(MODULE)
    (folder / "house_nothing.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(registration, "_ADAPTERS", dict(registry.registered()))
    monkeypatch.setattr(registration, "_FAMILIES", dict(registration.family_table()))
    yield "house_adapter"
    for name in ("house_adapter", "house_nothing"):
        sys.modules.pop(name, None)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """llava-tiny's weights and processor, as a model of the user's own type."""
    from vqguard.recipes.tiny.weights import load_base

    folder = tmp_path / "house"
    model, processor = load_base()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "house_llava"}))
    return folder


def test_verify_sees_an_adapter_of_the_user(
    module: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(model_folder)]) == 2
    assert "--adapter-module" in capsys.readouterr().err
    code = main(["verify", str(model_folder), "--adapter-module", module])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "house_llava at site 'projected': passed" in text


def test_an_installed_package_needs_no_option(
    module: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from importlib.metadata import EntryPoint

    from vqguard.adapters import plugins

    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        return [EntryPoint(name, module, group)] if name == "house_llava" else []

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    code = main(["verify", str(model_folder)])
    assert code == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_at_all", "no module 'no_such_module_at_all'"),
        ("house_nothing", "registers no adapter"),
        ("my/adapter.py", "dotted name"),
    ],
)
def test_modules_of_no_use(
    module: str, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "llava-tiny", "--adapter-module", name]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", TAKING)
def test_commands_that_load_a_model_take_it_and_say_that_code_runs(
    command: str, module: str
) -> None:
    runner = CliRunner()
    shown: Any = runner.invoke(program, [*command.split(), "--help"])
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    assert "--adapter-module MODULE" in text
    assert "Importing a module runs its code" in text
    assert "house_adapter" not in sys.modules


def test_it_is_imported_before_the_model_is_looked_for(module: str) -> None:
    runner = CliRunner()
    arguments = ["scan", "--run", "nowhere", "no.png", "--adapter-module", module]
    found: Any = runner.invoke(program, arguments)
    assert found.exit_code != 0
    assert "house_llava" in registry.registered()


def test_the_list_of_commands_is_whole() -> None:
    others = {"pretrain-tiny", "models", "report"}
    assert {name.split()[0] for name in TAKING} == set(COMMANDS) - others
