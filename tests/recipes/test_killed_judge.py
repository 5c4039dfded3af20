"""A regional judge whose training is killed goes on from its last state, to the same judge."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from vqguard.cli.main import main
from vqguard.recipes.judging.regional import HALF_WAY
from vqguard.recipes.tiny.scenes import draw, neutral_scene, toxic_scene
from vqguard.regional.training import CHECKPOINT_EVERY

pytestmark = pytest.mark.alone
STEPS = 10 * CHECKPOINT_EVERY


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    scenes = {
        "gun": [toxic_scene("calibration", 900, i, "gun") for i in range(12)],
        "neutral": [neutral_scene("calibration", 901, i, "single") for i in range(50)],
    }
    for category, some in scenes.items():
        (tmp_path / "pictures" / category).mkdir(parents=True)
        for number, scene in enumerate(some):
            path = tmp_path / "pictures" / category / f"{number:02d}.png"
            Image.fromarray(draw(scene)).save(path)
    return tmp_path / "pictures"


def command(pictures: Path, run: Path) -> list[str]:
    settings = {
        "guard.judge": "regional",
        "guard.semantic_codes": 8,
        "guard.regional.codes": 16,
        "guard.regional.hidden": 32,
        "regional.steps": STEPS,
        "regional.batch": 32,
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [
        *("retrofit", "--model", "llava-tiny", "--levels", "semantic", "--fpr", "0.1"),
        *("--images", str(pictures), "--output", str(run), *given),
    ]


def kill_half_way(pictures: Path, run: Path, log: Path) -> None:
    """Begin the run in a process of its own, and kill it when a first state is kept."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "vqguard.cli", *command(pictures, run)],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                # products round by the number of threads
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
            },
            stdout=output,
            stderr=output,
        )
    deadline = time.monotonic() + 300
    while not (run / HALF_WAY).is_file():
        assert child.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_a_killed_judge_is_resumed_bit_for_bit(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_half_way(pictures, killed, tmp_path / "log")
    assert not (killed / "model").exists()
    with caplog.at_level(logging.INFO):
        assert main([*command(pictures, killed), "--resume"]) == 0
    assert re.search(r"taken up behind step \d+", caplog.text)
    assert not (killed / HALF_WAY).exists()
    assert main(command(pictures, whole)) == 0
    for name in ("guard.json", "guard.safetensors"):
        mine, theirs = (run / "model" / "guard" / name for run in (killed, whole))
        assert mine.read_bytes() == theirs.read_bytes(), name
