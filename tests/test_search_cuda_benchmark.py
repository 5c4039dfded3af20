"""The benchmark of the search on a GPU: its pieces in small on the CPU, and its refusals."""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch
from click.testing import CliRunner

from benchmarks.search_cuda import Sizes, cuda, features, prefill, table
from tests.layout import ROOT
from tests.tensor_core_emulation import Emulated
from vqguard.search import backend_table
from vqguard.search.dense import DenseSearch

CPU = torch.device("cpu")
SMALL = Sizes(language=(64, 4, 4, 96, 2), visual=12, text=4, codes=90, dims=(64,))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize("kind", ["falling", "white"])
@torch.no_grad()
def test_a_table_has_every_search_and_its_share(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backend_table, "_BACKENDS", {"torch": DenseSearch, "tensor-cores": Emulated}
    )
    lines = table(kind, 64, SMALL, prefill(SMALL, CPU), 3, CPU)
    rows = [line.split("|") for line in lines if line.startswith("| ")]
    names = [row[1].strip() for row in rows]
    assert names == [
        "search", "---", "torch", "tensor-cores", "auto", "product and argmin", "prefill"
    ]  # fmt: skip
    for row in rows[2:6]:
        assert float(row[2]) > 0
        assert float(row[4]) > 0
    assert [row[5].strip() for row in rows[2:5]] == ["0"] * 3
    decided = re.search(r"one candidate (\d+), with a few (\d+), left .* (\d+)", "".join(lines))
    assert decided is not None
    assert sum(map(int, decided.groups())) == SMALL.visual


@torch.no_grad()
def test_without_a_prefill_no_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_table, "_BACKENDS", {"torch": DenseSearch})
    text = "\n".join(table("white", 64, SMALL, None, 2, CPU))
    assert "not measured" in text
    assert "prefill |" not in text.replace("% of the prefill |", "")


@torch.no_grad()
def test_the_prefill_is_of_the_shape_that_is_named() -> None:
    hidden = prefill(SMALL, CPU)()
    assert hidden.shape == (1, SMALL.visual + SMALL.text, 64)
    assert hidden.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    assert Sizes().language == (4096, 32, 32, 11008, 32)
    assert (Sizes().visual, Sizes().text) == (576, 64)


def test_features_have_the_shapes_that_are_asked_for() -> None:
    for kind in ("falling", "white"):
        words, tokens = features(kind, 30, 16, 5)
        assert (words.shape, tokens.shape) == ((30, 16), (5, 16))


@no_gpu
def test_without_a_gpu_nothing_is_measured() -> None:
    done = CliRunner().invoke(cuda, [])
    assert done.exit_code == 1
    assert "no CUDA device is visible; nothing was measured" in done.output


@no_gpu
def test_without_a_gpu_the_script_runs_nothing() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh")],
        env=os.environ | {"PYTHON": "false"},  # as one that sees no device
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no CUDA device is visible" in done.stderr
    assert done.stdout == ""
