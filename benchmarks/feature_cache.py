"""What keeping the vision encoder's outputs costs and saves: both stages with and without, in turn.

    python -m benchmarks.feature_cache [--config RECIPE.yaml] [--steps 8] [--rounds 5]

Prints the ratio of the training's time with kept features to that without (median and quartiles of
the rounds), stage by stage, both at as many steps each, and both at the steps that the recipe gives
them; the time it takes to make the cache as a share of that, and its size. One thread, CPU seconds
of the process. The search of the frozen codebook is calibrated once, before the first round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.stages import fresh, shortened, train
from benchmarks.timing import machine, shown
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.sources import source_of


def measure(whole: RetrofitRecipe, steps: int, rounds: int) -> None:
    recipe = shortened(whole, steps)
    weights = {1: whole.stage1.steps / steps, 2: whole.stage2.steps / steps}
    named = f"the recipe's {whole.stage1.steps} and {whole.stage2.steps} steps"
    source = source_of(recipe)
    taken: dict[tuple[str, int], list[float]] = {
        (way, stage): [] for way in ("without", "with") for stage in (1, 2)
    }
    calibration = None
    with tempfile.TemporaryDirectory() as folder:
        model, processor = fresh(recipe)
        samples = [
            *source.captions(recipe.stage1.samples),
            *source.instructions(recipe.stage2.samples),
        ]
        start = time.process_time()
        cache = FeatureCache.build(Path(folder), model, processor, samples)
        build = time.process_time() - start
        size = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
        for number in range(rounds + 1):  # the first warms up
            for way in ("without", "with"):
                model, processor = fresh(recipe)
                model.vqguard.patch.calibration = calibration
                for stage in (1, 2):
                    kept = cache if way == "with" else None
                    start = time.process_time()
                    model = train(recipe, stage, model, processor, source, kept)
                    if number:
                        taken[way, stage].append(time.process_time() - start)
                calibration = model.vqguard.patch.calibration
    print(machine())
    for stage in (1, 2):
        print(
            f"stage {stage}: with / without {shown(taken['with', stage], taken['without', stage])}"
        )
    for length, weight in (("as many steps each", {1: 1.0, 2: 1.0}), (named, weights)):
        both = {
            way: [
                first * weight[1] + second * weight[2]
                for first, second in zip(taken[way, 1], taken[way, 2], strict=True)
            ]
            for way in ("without", "with")
        }
        print(f"both, {length}: with / without {shown(both['with'], both['without'])}")
    samples_of_all = whole.stage1.samples + whole.stage2.samples
    share = build / len(cache) * samples_of_all / statistics.median(both["without"])
    print(f"making it: {share:.2f} of that; {size / len(cache) / 1e3:.0f} kB a sample")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="llava-tiny", help="a recipe's name or YAML file")
    parser.add_argument("--steps", type=int, default=8, help="steps a stage")
    parser.add_argument("--rounds", type=int, default=5)
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    measure(load_recipe(options.config), options.steps, options.rounds)


if __name__ == "__main__":
    main()
