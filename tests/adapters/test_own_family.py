"""A family is one file: its adapter, its names, its versions and what its random model needs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.adapters import get_adapter, list_models, registry, resolve_model
from vqguard.adapters.families import FAMILIES, registration
from vqguard.adapters.families.family import Family
from vqguard.adapters.families.names import checkpoints, read_checkpoints
from vqguard.adapters.families.registration import leave_unguarded, register_adapter
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.proof.random_models.conformance_table import run_family
from vqguard.adapters.registry import declared_family, is_known
from vqguard.errors import ConfigError, InputError, SeamError
from vqguard.recipes.extensions import import_extension

# What a new family's file holds; its model is LLaVA's under another name.
FAMILY = '''
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vqguard.adapters import Family, RandomModel, register_adapter
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.random_inputs.pixels import noise
from vqguard.adapters.random_inputs.prompts import placeholders


class OwnConfig(LlavaConfig):
    model_type = "own_type"


class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig


AutoConfig.register("own_type", OwnConfig, exist_ok=True)
AutoModelForImageTextToText.register(OwnConfig, OwnModel, exist_ok=True)


def small_pictures(model, images, generator):
    return {"pixel_values": noise(generator, images, 3, 16, 16)}


def chatty(layout):
    inputs = placeholders(layout)
    last = torch.full((len(layout.images), 1), 77)
    ids = torch.cat([inputs["input_ids"], last], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(last)], 1)
    return {"input_ids": ids, "attention_mask": mask}


@register_adapter(
    Family(
        "own_type",
        checkpoints={"own-7b": "somebody/own-7b"},
        proven_from="5.7",
        random_model=RandomModel(
            config={"vision_config.image_size": 16, "image_token_index": 90},
            pixels={"image": small_pictures},
            prompt=chatty,
            prepare=lambda model: setattr(model, "prepared", True),
        ),
    )
)
class OwnAdapter(DefaultAdapter):
    """Nothing differs from the usual names."""
'''


@pytest.fixture
def own_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the family's module; what it registers is forgotten after the test."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_ADAPTERS", dict(registry.registered()))
    monkeypatch.setattr(registration, "_FAMILIES", dict(registration.family_table()))
    for table in (CONFIG_MAPPING, AutoModelForImageTextToText._model_mapping):
        monkeypatch.setattr(table, "_extra_content", dict(table._extra_content))
    (tmp_path / "own_family.py").write_text(FAMILY)
    yield "own_family"
    sys.modules.pop("own_family", None)


def test_a_family_from_outside_is_one_file(own_family: str) -> None:
    assert import_extension(own_family) == ("own_type",)
    assert resolve_model("own-7b").location == "somebody/own-7b"
    assert [entry.model_type for entry in list_models()][-1] == "own_type"
    assert declared_family("own_type").proven_from == "5.7"
    assert not declared_family("own_type").is_proven("5.6.2")

    model = build_tiny("own_type")
    assert type(model).__name__ == "OwnModel"
    assert type(get_adapter(model)).__name__ == "OwnAdapter"
    assert is_known(model)
    assert model.config.vision_config.image_size == 16
    assert model.prepared
    inputs = make_inputs(model, (1, 2), seed=3)
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert (inputs["input_ids"][:, -1] == 77).all()
    assert (inputs["input_ids"] == 90).sum() == 3 * (16 // 8) ** 2
    same = make_inputs(model, (1, 2), seed=3)
    assert torch.equal(inputs["pixel_values"], same["pixel_values"])

    row = run_family("own_type")
    assert row["detail"] == ""
    assert (row["status"], row["adapter"]) == ("guarded", "OwnAdapter")


def test_before_its_file_is_imported_nothing_is_known_of_it() -> None:
    with pytest.raises(InputError, match="unknown model 'own-7b'"):
        resolve_model("own-7b")
    assert declared_family("own_type") == Family("own_type")
    with pytest.raises(InputError, match="no tiny model of type 'own_type'"):
        build_tiny("own_type")


def test_the_list_names_every_file_once() -> None:
    import vqguard.adapters.families as folder

    root = Path(folder.__file__).parent
    declaring = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if any(
            isinstance(node, ast.Call) and getattr(node.func, "id", "") in DECLARING
            for statement in ast.parse(path.read_text(encoding="utf-8")).body
            for node in _run_at_import(statement)
        )
    }
    assert sorted(FAMILIES) == sorted(declaring)


DECLARING = ("register_adapter", "conventional", "leave_unguarded")


def _run_at_import(statement: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(statement, ast.ClassDef):
        yield from statement.decorator_list
    elif isinstance(statement, ast.Expr):
        yield statement.value


def test_names_read_from_files_are_those_that_running_them_gives() -> None:
    own = {
        kind
        for kind, adapter in registry.registered().items()
        if adapter.__module__.startswith("vqguard.adapters.families.")
    }
    declared = {
        (name, kind, place)
        for kind, family in registration.family_table().items()
        if kind in own
        for name, place in family.checkpoints.items()
    }
    assert set(checkpoints()) == declared
    assert len(checkpoints()) == len(declared) >= 31


def test_every_type_of_the_mapping_is_declared() -> None:
    registry.registered()
    assert set(mapped_types()) <= set(registration.family_table())


@pytest.mark.parametrize(
    "source",
    [
        'conventional(Family(KIND, checkpoints={"a": "b/c"}))',
        'leave_unguarded(Family("kind", checkpoints=dict(a="b/c")))',
        '@register_adapter("x", Family("kind", checkpoints=NAMES))\nclass Adapter: ...',
    ],
)
def test_names_that_cannot_be_read_are_an_error(source: str) -> None:
    with pytest.raises(ConfigError, match="mine, line 2: expected a Family whose model type"):
        list(read_checkpoints(f"KIND = 1\n{source}\n", "mine"))


def test_listing_runs_no_file_of_a_family() -> None:
    code = (
        "import sys; from vqguard.adapters import list_models; assert len(list_models()) > 30;"
        "assert 'vqguard.adapters.families.llava' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_file_can_be_imported_first() -> None:
    """No file of a family counts on another having been imported."""
    for module in ("kosmos", "granite", "conventional.gemma"):
        code = f"import vqguard.adapters.families.{module}"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_type_that_is_never_guarded_gets_no_adapter() -> None:
    adapter: Any = registry.registered()["llava"]
    with pytest.raises(SeamError, match="not guarded: it answers with robot actions"):
        register_adapter("pi0")(adapter)
    with pytest.raises(SeamError, match="not guarded: it answers with robot actions"):
        register_adapter(Family("pi0"))(adapter)
    with pytest.raises(SeamError, match="not guarded: said here"):
        register_adapter(Family("own_type", refused="said here"))(adapter)
    with pytest.raises(SeamError, match=r"'llava' cannot be left unguarded.*LlavaAdapter"):
        leave_unguarded(Family("llava", refused="no"))
    with pytest.raises(SeamError, match=r"'own_type' cannot be left unguarded.*no reason"):
        leave_unguarded(Family("own_type"))


def test_a_class_that_registers_again_keeps_what_was_said() -> None:
    said = declared_family("llava")
    assert said.checkpoints
    adapter: Any = registry.registered()["llava"]
    register_adapter("llava")(adapter)
    assert declared_family("llava") is said


def test_conventional_adapters_are_found_by_name() -> None:
    """As pickle does it, which copies a model to another process."""
    for kind in ("gemma4_unified", "aya_vision"):
        adapter = registry.registered()[kind]
        assert getattr(importlib.import_module(adapter.__module__), adapter.__name__) is adapter
