"""Every example runs as its first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
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


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_every_example_has_a_test(name: str) -> None:
    assert f'"{name}"' in Path(__file__).read_text()
