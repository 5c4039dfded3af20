"""Kills processes that save, calibrate and export at random moments, and loads what they leave.

`python saves_program.py FOLDER SEED KILLS` prints a JSON object. The processes are forked from this
one, which has imported what they need, and are killed by SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.storage.manifest import holds_manifest
from vqguard.recipes.calibrate import calibrate_run
from vqguard.recipes.export import export_run
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.tiny.weights import load_base

BASE = "llava-tiny"
LONGEST = 1.5  # seconds; a round of one kind of work takes less


def prepare(folder: Path) -> None:
    """A run, its model whole and without its base, and labelled images."""
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias += 1
    for category, colour in (("neutral", (0, 90, 0)), ("gun", (200, 0, 0))):
        (folder / "images" / category).mkdir(parents=True)
        for number in range(2):
            image = Image.new("RGB", (64, 64), (colour[0], colour[1], number))
            image.save(folder / "images" / category / f"{number}.png")
    run = folder / "run"
    run.mkdir()
    load_recipe(BASE).to_yaml(run / "recipe.yaml")
    save_run_model(run, model, processor)
    calibrate(run)
    export_run(run, folder / "whole")
    export_run(run, folder / "alone", guard_only=True)


def calibrate(folder: Path, tau: float = 0.5) -> None:
    calibrate_run(folder, folder.parent / "images", fpr=None, tau=tau)


def save(folder: Path) -> None:
    opened = open_run(folder / "run")
    while True:
        save_run_model(folder / "run", opened.model, opened.processor)


def save_whole(folder: Path) -> None:
    opened = open_run(folder / "whole")
    while True:
        opened.model.save_pretrained(folder / "whole", processor=opened.processor)


def save_alone(folder: Path) -> None:
    opened = open_run(folder / "alone")
    while True:
        save_guard_only(opened.model, folder / "alone", BASE, processor=opened.processor)


def calibrate_all(folder: Path) -> None:
    for tau in (0.2, 0.4, 0.6, 0.8) * 100:
        for name in ("run", "whole", "alone"):
            calibrate(folder / name, tau)


def export(folder: Path) -> None:
    while True:
        for number, guard_only in enumerate((False, True)):
            export_run(folder / "run", folder / f"out{number}", guard_only=guard_only)
            (folder / f"out{number}").rename(folder / f"done{time.monotonic_ns()}")


WORK: tuple[Callable[[Path], None], ...] = (save, save_whole, save_alone, calibrate_all, export)


def check(folder: Path, found: Counter[str]) -> None:
    """Load all folders; what is none yet is as it was: empty but for drafts."""
    for name in ("run/model", "whole", "alone"):
        assert load_guarded(folder / name).vqguard.safety_map is not None
        found[name] += 1
    for path in (*folder.glob("out*"), *folder.glob("done*")):
        whole = holds_manifest(path)
        assert whole or path.name.startswith("out")
        if whole:
            assert load_guarded(path).vqguard.safety_map is not None
        else:
            export_run(folder / "run", path)  # drafts are in nobody's way
        found["whole exports" if whole else "exports begun"] += 1
        shutil.rmtree(path)


def main(folder: Path, seed: int, kills: int) -> None:
    generator = random.Random(seed)
    prepare(folder)
    found: Counter[str] = Counter()
    for number in range(kills):
        before = set(folder.rglob(".vqguard-*"))
        child = os.fork()
        if not child:
            try:
                WORK[number % len(WORK)](folder)
            finally:
                os._exit(3)
        time.sleep(generator.uniform(0, LONGEST))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"{WORK[number % len(WORK)].__name__} failed by itself")
        found["kills"] += 1
        found["drafts"] += bool(set(folder.rglob(".vqguard-*")) - before)
        check(folder, found)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    # Processes share the lock of progress bars: one killed with it would stop all others.
    disable_progress_bar()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
