"""The package's surface: everything is there, and nothing heavy comes with it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import vqguard

HEAVY = ["torch", "transformers", "faiss", "matplotlib", "timm", "peft", "accelerate", "PIL"]


def _imported_by(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.alone
def test_import_is_light() -> None:
    assert not _imported_by("import vqguard; vqguard.__version__") & set(HEAVY)
    config = _imported_by("from vqguard import GuardConfig, InputError; GuardConfig(4, 4)")
    assert not config & set(HEAVY)


@pytest.mark.alone
def test_the_layer_needs_torch_alone() -> None:
    loaded = _imported_by(
        "import torch; from vqguard import VQGuard, GuardConfig, GuardedEncoder, SafetyMap;"
        "VQGuard(GuardConfig(4, 4, patch_codes=9, semantic_codes=3)).eval()"
        "(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))"
    )
    assert not loaded & {"transformers", "faiss", "matplotlib", "timm", "peft", "accelerate"}


def test_version_is_the_distributions() -> None:
    assert vqguard.__version__ == version("vqguard")


@pytest.mark.parametrize("name", vqguard.__all__)
def test_every_name_resolves(name: str) -> None:
    assert getattr(vqguard, name) is not None
    assert name in dir(vqguard)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'VQGard'"):
        vqguard.VQGard  # noqa: B018
