"""The memory plan of a recipe beside the measured peak, each stage in a process of its own.

    python -m benchmarks.memory_plan [--config RECIPE.yaml] [--steps 4] [--set stage1.batch=32]

Without --config it is llava-tiny's. With data of your own the plan counts sequences of max_length.

Each stage runs twice: as it is, and with glibc told to give every freed block of 16 KB or more back
to the system at once (MALLOC_MMAP_THRESHOLD_), so that what the allocator keeps is told from what
the step needs.

Measured is the growth of the resident set: its peak in training (VmHWM) less what the process held
with all imported and before the model was made (VmRSS). Linux only. Planned is the total of
``vqguard retrofit --dry-run --gpus 0``. One run a stage; the ratio is planned / measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vqguard.recipes.recipe import RetrofitRecipe, load_recipe


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_stage(recipe: RetrofitRecipe, number: int) -> dict[str, int]:
    """Train one stage of a fresh guard here, and say what the process held."""
    import torch

    from benchmarks.stages import fresh, train
    from vqguard.recipes.sources import source_of

    torch.manual_seed(recipe.seed)
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # the thread pool
    source = source_of(recipe)
    before = resident("VmRSS")
    model, processor = fresh(recipe)
    train(recipe, number, model, processor, source)
    return {"before": before, "peak": resident("VmHWM")}


RETURNED = {"MALLOC_MMAP_THRESHOLD_": "16384"}


def measure(recipe: RetrofitRecipe, number: int, environment: dict[str, str]) -> int:
    """Growth of the resident set in a stage, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        recipe.to_json(path)
        command = [sys.executable, "-m", __spec__.name, "--child", str(path), str(number)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found["peak"] - found["before"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="llava-tiny", help="a recipe's name or YAML file")
    parser.add_argument("--steps", type=int, default=4, help="steps a stage")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.child:
        path, number = options.child
        print(json.dumps(run_stage(RetrofitRecipe.from_json(path), int(number))))
        return
    from benchmarks.stages import shortened
    from vqguard.recipes.planning.plan import plan

    # The stages are run here on pixels, as without kept features.
    recipe = load_recipe(options.config).override(["features.cache=false", *options.settings])
    recipe = shortened(recipe, options.steps)
    print(f"{'stage':6}{'allocator':>12}{'planned MB':>12}{'measured MB':>13}{'ratio':>8}")
    for stage in plan(recipe, gpus=0).stages:
        planned = stage.memory.total
        for name, environment in (("as it is", {}), ("returning", RETURNED)):
            measured = measure(recipe, stage.stage, environment)
            figures = f"{planned / 1e6:12.0f}{measured / 1e6:13.0f}{planned / measured:8.2f}"
            print(f"{stage.stage:<6}{name:>12}{figures}", flush=True)
        print("      ", {part: round(size / 1e6) for part, size in vars(stage.memory).items()})


if __name__ == "__main__":
    main()
