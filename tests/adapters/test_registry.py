"""Names lead somewhere, and wrong names are answered with right ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vqguard.adapters import Adapter, get_adapter, list_models, register_adapter, resolve_model
from vqguard.adapters.families.llava import LlavaAdapter
from vqguard.adapters.registry import adapter_for_type, adapter_types
from vqguard.errors import InputError, SeamError


def test_every_name_resolves_and_has_an_adapter() -> None:
    names = [entry.name for entry in list_models()]
    assert len(set(names)) == len(names)
    for entry in list_models():
        assert resolve_model(entry.name) is entry
        assert adapter_for_type(entry.model_type) is not None
        if entry.source == "hub":
            assert resolve_model(entry.location).location == entry.location
    assert resolve_model("llava-1.5").location == "llava-hf/llava-1.5-7b-hf"
    assert resolve_model("llava-tiny").source == "package"
    assert "llava" in adapter_types()


def test_paths_and_unlisted_ids_are_names_too(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)).source == "path"
    entry = resolve_model("hub:someone/llava-finetuned")
    assert (entry.source, entry.location) == ("hub", "someone/llava-finetuned")


@pytest.mark.parametrize("name", ["llava-tinny", "lava-tiny", "LLaVA-tiny"])
def test_wrong_name_is_corrected(name: str) -> None:
    with pytest.raises(InputError, match="did you mean 'llava-tiny'"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", ""])
def test_missing_folder_is_named(name: str) -> None:
    with pytest.raises(InputError, match="no folder"):
        resolve_model(name)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(SeamError, match="nearest: 'llava'"):
        get_adapter(SimpleNamespace(config=SimpleNamespace(model_type="lava")))
    with pytest.raises(SeamError, match="wrap other vision encoders"):
        get_adapter(object())


def test_a_type_has_one_adapter() -> None:
    assert register_adapter("llava")(LlavaAdapter) is LlavaAdapter
    with pytest.raises(SeamError, match="already has"):

        @register_adapter("llava")
        class Other(Adapter):
            pass


@pytest.mark.alone
def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from vqguard.adapters import list_models; list_models();"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
