"""Retrofit llava-tiny, very small, on as many processes as a launcher starts.

    torchrun --nproc_per_node 2 examples/retrofit_on_several_processes.py FOLDER
    accelerate launch --multi_gpu --num_processes 2 \\
        examples/retrofit_on_several_processes.py FOLDER

Without a launcher it runs in one process, and the guard is the same: the recipe's batch is that of
all processes together. `vqguard retrofit` is launched likewise, as `-m vqguard.cli retrofit`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import open_run

SMALL = [
    "guard.judge=global",  # a regional judge learns from thousands of images
    "guard.start_samples=160",
    "guard.patch_codes=64",
    "guard.semantic_codes=16",
    "stage1.samples=64",
    "stage1.batch=16",
    "stage2.samples=32",
    "stage2.batch=16",
    "calibration.neutral=100",
    "evaluation.finetuned_control=false",
    "evaluation.utility=4",
    "evaluation.toxic_per_category=2",
    "evaluation.neutral=8",
    "evaluation.latency_rounds=3",
    "evaluation.attack.eps_255=[16]",
    "evaluation.attack.requests=1",
    "evaluation.attack.steps=2",
    "evaluation.attack.universal_requests=1",
    "evaluation.attack.universal_held_out=1",
    "evaluation.attack.universal_steps=2",
]


def main(folder: Path) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    recipe = load_recipe("llava-tiny").override(SMALL)
    result = retrofit(recipe, folder / "run", command=f"{processes} x {Path(__file__).name}")
    if not result.records:
        return  # not the first process: it has trained, the first has measured
    guard = open_run(result.run).model.vqguard
    print(f"processes: {processes}")
    print(f"patch codebook: {guard.checksum('patch')}")
    print(f"report: {result.report_html}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
