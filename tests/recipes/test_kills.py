"""A whole retrofit killed at eleven random moments ends where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "kills_program.py"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_eleven_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), str(seed)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] == 11
    assert found["files"] >= 4
    assert found["other_files"] == []
    assert found["same_names"]
    assert found["metrics"] > 50
    assert found["largest_difference"] <= 1e-6
    assert found["steps"] == [{"stage1": 8, "stage2": 8}] * 2
