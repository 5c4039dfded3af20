"""A whole retrofit killed at ten random moments ends where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vqguard.adapters.weight_files import file_sha256

SIZES = [
    "guard.start_samples=160",
    "guard.patch_codes=64",
    "guard.semantic_codes=16",
    "stage1.samples=128",
    "stage1.batch=16",
    "stage1.checkpoint_every=1",
    "stage2.samples=64",
    "stage2.batch=8",
    "stage2.checkpoint_every=1",
    "calibration.neutral=100",
    "evaluation.utility=12",
    "evaluation.toxic_per_category=2",
    "evaluation.neutral=8",
    "evaluation.latency_rounds=3",
    "evaluation.attack.eps_255=[16]",
    "evaluation.attack.requests=2",
    "evaluation.attack.steps=3",
    "evaluation.attack.universal_requests=2",
    "evaluation.attack.universal_held_out=2",
    "evaluation.attack.universal_steps=3",
]
# The program's own words at the beginning of each part, on stderr.
PARTS = [
    "retrofit: features",
    "retrofit: kmeans",
    "retrofit: feature_cache",
    "retrofit: stage1",
    "retrofit: stage1",
    "retrofit: stage2",
    "retrofit: calibration",
    "retrofit: control_projector",
    "retrofit: control_stage2",
    "evaluation: utility",
]
MEASURES_TIME_OR_MEMORY = {"stage_seconds", "latency_ratio", "peak_memory_mb"}
LONGEST = 3600.0


def start(run: Path, *options: str) -> subprocess.Popen[bytes]:
    settings = [part for size in SIZES for part in ("--set", size)]
    command = ["-m", "vqguard.cli", "retrofit", "--model", "llava-tiny", "--output", str(run)]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *command, *settings, *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    assert process.wait(LONGEST) == 0, log.read_text()[-2000:]


def begun(log: Path, parts: list[str], after: int, process: subprocess.Popen[bytes]) -> float:
    """Wait for one of the parts to be named in the log behind the place ``after``; returns when."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        new = log.read_bytes()[after:]
        if any(part.encode() in new for part in parts):
            return time.monotonic()
        assert process.poll() is None, f"ended before {parts[0]}: {log.read_text()[-2000:]}"
        time.sleep(0.02)
    raise AssertionError(f"{parts[0]} did not begin")


def durations(process: subprocess.Popen[bytes], log: Path) -> dict[str, float]:
    """Seconds of each part of an uninterrupted run."""
    order = [*dict.fromkeys(PARTS), "evaluation: toxic scenes"]
    times = [begun(log, [part], 0, process) for part in order]
    return {p: b - a for p, a, b in zip(order, times, times[1:], strict=False)}


def result(run: Path) -> dict[str, Any]:
    """Checksums of the models and the report's metrics, but those of time and memory."""
    files = [*(run / "model").rglob("*.safetensors"), *(run / "model").rglob("*.json")]
    files += (run / "control" / "model").glob("*.safetensors")
    sums = {str(path.relative_to(run)): file_sha256(path) for path in files}
    records = json.loads((run / "report.json").read_text())["records"]
    metrics = {
        json.dumps([r["metric"], r["subject"], r["condition"], r["n"]]): r["value"]
        for r in records
        if r["metric"] not in MEASURES_TIME_OR_MEMORY
    }
    return {"sums": sums, "metrics": metrics}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_ten_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "whole.log"
    process = start(whole)
    seconds = durations(process, log)
    finish(process, log)
    generator = random.Random(seed)
    log = tmp_path / "killed.log"
    log.touch()
    landed = 0
    for number, part in enumerate(PARTS):
        read = log.stat().st_size
        process = start(killed, "--resume")
        begun(log, PARTS[number:], read, process)  # an earlier kill may have come after its end
        time.sleep(generator.uniform(0, seconds[part]))
        landed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert landed == len(PARTS)
    process = start(killed, "--resume")
    finish(process, log)
    expected, found = result(whole), result(killed)
    assert found["sums"] == expected["sums"]
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=1e-6), name
    steps = [
        len((run / "stage1" / "metrics.jsonl").read_text().splitlines()) for run in (whole, killed)
    ]
    assert steps == [8, 8]
    print(
        f"seed {seed}: {landed} kills, {len(found['sums'])} files and "
        f"{len(found['metrics'])} metrics as in the uninterrupted run"
    )
