"""Fifty kills while guarded models are saved, calibrated and exported: the folders always load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "saves_program.py"
KILLS = 50


@pytest.mark.slow
@pytest.mark.alone
def test_fifty_kills_leave_folders_that_load(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), "0", str(KILLS)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] == KILLS
    assert all(found[name] == KILLS for name in ("run/model", "whole", "alone"))
    assert found["drafts"] >= KILLS // 5  # the kills came while files were written
