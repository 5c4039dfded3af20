"""What a verdict by majority over changed copies costs: in time, and in what it finds.

    python -m benchmarks.smoothing runs/demo

The guard of a run of llava-tiny under other settings of `guard.smoothing`, its codebooks and map
as they are. Prints the table of docs/judge.md; what an attacker does to each, `vqguard attack`
says.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import alternate, machine, shown
from vqguard.adapters import guard_model, unguard_model
from vqguard.config import SmoothingSettings
from vqguard.intervals import wilson
from vqguard.recipes.attacking.subjects import same_guard
from vqguard.recipes.image_batches import pixel_inputs, screen_images
from vqguard.recipes.run import LoadedRun, open_run
from vqguard.recipes.tiny.scenes import NEUTRAL_SCENES
from vqguard.recipes.tiny.world import TinyWorld

SETTINGS: dict[str, SmoothingSettings] = {
    "the picture itself": SmoothingSettings(),
    "5 copies, noise 0.25": SmoothingSettings(copies=5, noise=0.25),
    "15 copies, noise 0.25": SmoothingSettings(copies=15, noise=0.25),
    "5 copies, noise 0.5": SmoothingSettings(copies=5, noise=0.5),
    "5 copies, noise 1": SmoothingSettings(copies=5, noise=1.0),
    "5 copies, crop 0.125": SmoothingSettings(copies=5, noise=0.0, crop=0.125),
    "5 copies, crop 0.125 and noise 0.25": SmoothingSettings(copies=5, noise=0.25, crop=0.125),
}
DISTRACTORS = (0, 1)


def smoothed(loaded: LoadedRun, settings: SmoothingSettings) -> Any:
    """A copy of the model whose verdicts are a majority by these settings."""
    guard = loaded.model.vqguard
    model = copy.deepcopy(loaded.model)
    unguard_model(model)
    guard_model(model, same_guard(guard, guard.safety_map, smoothing=settings), loaded.processor)
    return model.eval()


def rate(flags: list[bool]) -> str:
    """A share with its 95 % interval."""
    hits, n = sum(flags), len(flags)
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run of llava-tiny")
    parser.add_argument("--scenes", type=int, default=420, help="toxic and neutral ones a cell")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = open_run(given.run)
    world = TinyWorld(0, given.split)
    each = -(-given.scenes // len(world.categories))
    models = {name: smoothed(loaded, settings) for name, settings in SETTINGS.items()}
    scene = list(islice(world.toxic_images(world.categories[0], 0, 1), 1))
    pixels = pixel_inputs(loaded.processor, scene, loaded.model.device)
    seconds = alternate(
        {name: partial(model.screen, **pixels) for name, model in models.items()},
        given.rounds,
        warm=2,
    )
    plain = seconds["the picture itself"]
    heads = ["verdict by", "time", *(f"DSR, {beside} distractors" for beside in DISTRACTORS)]
    heads += [f"FPR, {kind}" for kind in NEUTRAL_SCENES]
    print(machine())
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for name, model in models.items():
        cells = [shown(seconds[name], plain)]
        for beside in DISTRACTORS:
            toxic = (world.toxic_images(category, beside, each) for category in world.categories)
            verdicts = screen_images(model, loaded.processor, chain.from_iterable(toxic))
            cells.append(rate([verdict.flagged for verdict in verdicts]))
        for objects in NEUTRAL_SCENES.values():
            neutral = world.neutral_images(objects, given.scenes)
            verdicts = screen_images(model, loaded.processor, neutral)
            cells.append(rate([verdict.flagged for verdict in verdicts]))
        print(f"| {' | '.join([name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
