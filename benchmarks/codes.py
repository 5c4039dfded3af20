"""What training stage 2 from codes saves: on pixels, on kept features and on codes, in turn.

    python -m benchmarks.codes [--config RECIPE.yaml] [--steps 10] [--rounds 7]
    python -m benchmarks.codes --memory [--steps 3]

Prints the ratios of the time of stage 2's steps on codes to that on pixels and on kept features
(median and quartiles of the rounds; the first step of each is left out), what making the codes
takes as a share of it, and their size. The codebooks hold random features of the data. One thread;
wall clock and CPU seconds of the process.
With `--memory` it prints instead the peak resident memory of a process for each way, the median of
the rounds, beside the size of the vision encoder.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.stages import fresh, shortened
from benchmarks.timing import machine, shown
from vqguard.adapters import get_adapter
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.picture_codes import build_codes
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.sources import source_of
from vqguard.recipes.training.stage2 import Stage2Trainer

WAYS = ("pixels", "features", "codes")


class Setting:
    """A guarded model with codebooks of the data's own features, and its kept pictures."""

    def __init__(self, recipe: RetrofitRecipe, folder: Path) -> None:
        self.recipe = recipe
        self.source = source_of(recipe)
        self.model, self.processor = fresh(recipe)
        samples: list[Sample] = list(self.source.instructions(recipe.stage2.samples))
        self._start(recipe, samples)
        guard = self.model.vqguard.freeze()
        self.cache = FeatureCache.build(folder / "features", self.model, self.processor, samples)
        self.samples = samples
        plain = self.encoded()
        build_codes(folder / "first", self.model, plain)  # times the search as well
        start = time.process_time()
        self.codes = build_codes(folder / "codes", self.model, plain)
        self.seconds = (time.process_time() - start) / len(samples)
        """CPU seconds that the codes of a sample take."""
        self.calibration = guard.patch.calibration

    def encoded(self, **kept: Any) -> EncodedSamples:
        return EncodedSamples(self.samples, self.processor, self.recipe.stage2.max_length, **kept)

    def _start(self, recipe: RetrofitRecipe, samples: list[Sample]) -> None:
        every = list(self.source.captions(max(1, -(-recipe.guard.patch_codes // 30))))
        pictures = [opener() for sample in [*every, *samples] for opener in sample.images]
        patches, semantic = collect_features(self.model, self.processor, pictures)
        guard = self.model.vqguard
        guard.patch.codebook.start_from(patches, "sample", recipe.seed)
        guard.semantic.codebook.start_from(semantic, "sample", recipe.seed)

    def train(self, way: str) -> tuple[float, float]:
        """Seconds of wall clock and of the processor from the first step's end to the last's."""
        model = copy.deepcopy(self.model)
        model.vqguard.patch.calibration = self.calibration
        kept: dict[str, Any] = {"features": {"cache": self.cache}, "codes": {"codes": self.codes}}
        data, clock = self.encoded(**kept.get(way, {})), Clock()
        with tempfile.TemporaryDirectory() as folder:
            trainer = Stage2Trainer(model, self.recipe.stage2, data, Path(folder), seed=0)
            trainer.add_callback(clock)
            trainer.run(resume=False)
        (wall, own), (wall_end, own_end) = clock.times[0], clock.times[-1]
        return wall_end - wall, own_end - own


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def measure(recipe: RetrofitRecipe, rounds: int) -> None:
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(recipe, Path(folder))
        size = sum(path.stat().st_size for path in (Path(folder) / "codes").iterdir())
        for number in range(rounds + 1):  # the first warms up
            for way in WAYS:
                seconds = setting.train(way)
                if number:
                    taken[way].append(seconds)
    print(machine())
    for other in ("pixels", "features"):
        for kind, name in enumerate(("wall clock", "processor")):
            ours, theirs = ([s[kind] for s in taken[way]] for way in ("codes", other))
            print(f"stage 2, codes / {other}, {name}: {shown(ours, theirs)}")
    trained = recipe.stage2.batch * (recipe.stage2.steps - 1)
    share = setting.seconds * trained / statistics.median(own for _, own in taken["pixels"])
    print(f"making them from pixels: {share:.2f} of stage 2 on pixels")
    print(f"{size / len(setting.codes):.0f} bytes a sample with its place in the index")


def measure_memory(config: str, steps: int, rounds: int) -> None:
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    vision = 0
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.codes", "--config", config]
            command += ["--steps", str(steps), "--one", way]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, vision = (int(word) for word in out.split()[-2:])
            peaks[way].append(peak)
    print(machine())
    for way in WAYS:
        print(f"stage 2 on {way}: {statistics.median(peaks[way]) / 1e6:.0f} MB at the peak")
    print(f"vision encoder: {vision / 1e6:.1f} MB")


def one(recipe: RetrofitRecipe, way: str) -> None:
    """Print the peak of this process since the codes were made, and the vision encoder's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(recipe, Path(folder))
        vision = get_adapter(setting.model).vision_modules(setting.model)
        size = sum(4 * p.numel() for module in vision for p in module.parameters())
        # The high-water mark begins anew: what making the codes took is not stage 2's.
        Path("/proc/self/clear_refs").write_text("5")
        setting.train(way)
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="llava-tiny", help="a recipe's name or YAML file")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory in place of time")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    recipe = shortened(load_recipe(options.config), options.steps)
    if options.one:
        one(recipe, options.one)
    elif options.memory:
        measure_memory(options.config, options.steps, options.rounds)
    else:
        measure(recipe, options.rounds)


if __name__ == "__main__":
    main()
