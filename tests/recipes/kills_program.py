"""Kills a whole retrofit at eleven random moments, resuming it each time, and compares its end.

`python kills_program.py FOLDER SEED [WHOLE]` prints a JSON object. WHOLE: an uninterrupted run that
is there already. Runs are forked from this process, which has imported what they need but computed
nothing, and are killed by SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import vqguard.recipes.retrofit
import vqguard.recipes.tiny.weights
import vqguard.recipes.tiny.world  # noqa: F401  the runs find it imported
from vqguard.cli.main import main
from vqguard.files import file_sha256

SIZES = [
    "guard.start_samples=160",
    "guard.patch_codes=64",
    "guard.semantic_codes=16",
    "guard.judge=global",
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
# The program's own words at the beginning of each part, on stderr; one kill in each.
PARTS = [
    "run_folder: features",
    "run_folder: kmeans",
    "run_folder: feature_cache",
    "run_folder: stage1",
    "run_folder: stage1",
    "run_folder: codes",
    "run_folder: stage2",
    "run_folder: calibration",
    "run_folder: control_projector",
    "run_folder: control_stage2",
    "evaluation: utility",
]
SECONDS_OF = [part.rpartition(" ")[2] for part in PARTS]
MEASURES_TIME_OR_MEMORY = {"stage_seconds", "latency_ratio", "peak_memory_mb"}
LONGEST = 3600.0


def start(run: Path, *options: str) -> int:
    """Begin a run in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        for number, path in ((1, Path(os.devnull)), (2, log_of(run))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        settings = [part for size in SIZES for part in ("--set", size)]
        name = ["retrofit", "--model", "llava-tiny", "--output", str(run)]
        code = main([*name, *settings, *options])
    finally:
        os._exit(code)


def log_of(run: Path) -> Path:
    return run.with_suffix(".log")


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(child: int, run: Path) -> None:
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run failed: {log_of(run).read_text()[-3000:]}")


def begun(run: Path, parts: list[str], after: int, child: int) -> None:
    """Wait for one of the parts to be named in the log behind the place `after`."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        if log_of(run).exists():
            new = log_of(run).read_bytes()[after:]
            if any(part.encode() in new for part in parts):
                return
        if ended(child):
            raise SystemExit(f"ended before {parts[0]}: {log_of(run).read_text()[-3000:]}")
        time.sleep(0.02)
    raise SystemExit(f"{parts[0]} did not begin")


def kill_in(run: Path, number: int, longest: float, generator: random.Random) -> bool:
    """Resume a run, kill it some time after the part began; returns whether it was alive."""
    log = log_of(run)
    read = log.stat().st_size if log.exists() else 0
    child = start(run, "--resume")
    begun(run, PARTS[number:], read, child)  # an earlier kill may have come after its end
    time.sleep(generator.uniform(0, longest))
    alive = not ended(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return alive


def result(run: Path) -> dict[str, Any]:
    """Checksums of the models, and the report's metrics but those of time and memory."""
    files = [*(run / "model").rglob("*.safetensors"), *(run / "model").rglob("*.json")]
    files += (run / "control" / "model").glob("*.safetensors")
    records = json.loads((run / "report.json").read_text())["records"]
    return {
        "sums": {str(path.relative_to(run)): file_sha256(path) for path in sorted(files)},
        "metrics": {
            json.dumps([r["metric"], r["subject"], r["condition"], r["n"]]): r["value"]
            for r in records
            if r["metric"] not in MEASURES_TIME_OR_MEMORY
        },
        "steps": {
            stage: len((run / stage / "metrics.jsonl").read_text().splitlines())
            for stage in ("stage1", "stage2")
        },
    }


def experiment(folder: Path, seed: int, whole: Path | None) -> dict[str, Any]:
    if whole is None:
        whole = folder / "whole"
        finish(start(whole), whole)
    seconds = json.loads((whole / "stage_seconds.json").read_text())
    generator = random.Random(seed)
    killed = folder / "killed"
    landed = sum(
        kill_in(killed, number, seconds.get(name, 2.0), generator)
        for number, name in enumerate(SECONDS_OF)
    )
    finish(start(killed, "--resume"), killed)
    expected, found = result(whole), result(killed)
    names = expected["metrics"].keys()
    apart = [abs(found["metrics"].get(n, 1e9) - expected["metrics"][n]) for n in names]
    return {
        "seed": seed,
        "kills": landed,
        "files": len(expected["sums"]),
        "other_files": [n for n, s in expected["sums"].items() if found["sums"].get(n) != s],
        "metrics": len(names),
        "largest_difference": max(apart),
        "same_names": names == found["metrics"].keys(),
        "steps": [expected["steps"], found["steps"]],
    }


if __name__ == "__main__":
    given = [Path(path) for path in sys.argv[3:]]
    print(json.dumps(experiment(Path(sys.argv[1]), int(sys.argv[2]), given[0] if given else None)))
